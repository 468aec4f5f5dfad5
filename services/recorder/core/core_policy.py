"""How much of a process's memory its core may hold: all, the stacks, or nothing.

A core is a copy of memory, secrets and all, so that it can be switched off for some programs and
users. And of a program that crashes again and again the hundredth core tells nothing new, but
fills disk and bus.
"""

import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Self

from crashbus import names, own_cores
from crashbus.parts import Process
from services.common import process as processes
from services.common.proc import mappings

LOOP_SECONDS = 60.0
# kubepods-burstable-pod<UID>.slice, or kubepods/burstable/pod<UID>
_POD = re.compile(r"[/-]pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})(?:\.slice)?/")
_FIRST_MAPPINGS = 64 * 1024  # bytes of proc_pid_maps(5); the executable's come first
_FIELDS = ("executable", "argument", "user", "container", "label")
_MAX_PROGRAMS = 10_000  # remembered; the one that crashed longest ago is forgotten


_Program = tuple[str, int, str]  # executable, UID, and where it is the same


class Extent(Enum):
    """What a core may hold."""

    ALL = "all"
    STACKS = "stacks"
    NOTHING = "nothing"  # the stacks are read for the backtrace, and then gone


@dataclass(frozen=True)
class Decision:
    """How much, and why it is not all."""

    extent: Extent
    because: str = ""


@dataclass(frozen=True)
class Rule:
    """Processes that leave no core: ``executable=/usr/bin/vault*``, ``argument=*/vault.py``,
    ``user=postgres``, ``container=<ID, or its beginning>``, ``label=<name>`` or
    ``label=<name>=<value>``.

    Attributes:
        setting: who made it.
    """

    field: str
    pattern: str
    setting: str = "CRASHBUS_RECORDER_CORE_OFF"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a rule.

        Raises:
            ValueError: it is none.
        """
        field, sign, pattern = text.strip().partition("=")
        if field not in _FIELDS or not sign or not pattern:
            raise ValueError(
                f"{text.strip()!r} is no rule: executable=PATTERN, argument=PATTERN, user=NAME, "
                "container=ID or label=NAME"
            )
        return cls(field, pattern)

    def fits(self, process: Process, username: str, command_line: bytes) -> bool:
        """Tell whether it is about this process; arguments as for `CorePolicy.decide`."""
        match self.field:
            case "executable":
                path = process.executable or process.comm
                # What is behind the path of one that was replaced meanwhile, proc_pid_exe(5).
                paths = path, path.removesuffix(" (deleted)")
                return any(fnmatchcase(one, self.pattern) for one in paths)
            case "argument":
                if len(command_line) >= processes.MAX_READ:  # the rest may have it
                    return True
                return any(fnmatchcase(one, self.pattern) for one in _arguments(command_line))
            case "user":
                return self.pattern in (username, str(process.uid))
            case "comm":
                return process.comm == self.pattern
            case "container":
                return process.container is not None and process.container.id.startswith(
                    self.pattern
                )
            case _:
                name, sign, value = self.pattern.partition("=")
                found = process.container.labels.get(name) if process.container else None
                return found is not None and (not sign or found == value)


def _arguments(command_line: bytes) -> set[str]:
    """Return the arguments, each once: hundreds of thousands of the same cost nothing."""
    given = command_line.removesuffix(b"\0").split(b"\0") if command_line else []
    return {os.fsdecode(one) for one in set(given)}


# Crashbus's own processes, which hold the keys of bus and destinations.
OWN = tuple(Rule("comm", name, "CRASHBUS_RECORDER_OWN_CORES") for name in own_cores.NAMES)


class CorePolicy:
    """Decides for each crash; used by several threads.

    Args:
        extent: of all cores.
        off: for whom there are none.
        burst: crashes of one program within a minute that are not a loop yet; 0: none ever is.
        one_in: of this many crashes in a loop, one leaves a whole core.
    """

    def __init__(
        self,
        extent: Extent,
        off: tuple[Rule, ...] = (),
        burst: int = 0,
        one_in: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._extent = extent
        self._off = off
        self._burst = burst
        self._one_in = one_in
        self._clock = clock
        self._lock = threading.Lock()
        self._crashes: OrderedDict[_Program, deque[float]] = OrderedDict()
        self._in_loop: dict[_Program, int] = {}

    @property
    def asks_for_labels(self) -> bool:
        """Whether a container's labels must be known to decide."""
        return any(rule.field == "label" for rule in self._off)

    @property
    def asks_for_arguments(self) -> bool:
        """Whether the command line must be known to decide."""
        return any(rule.field == "argument" for rule in self._off)

    def decide(
        self, process: Process, username: str, maps: bytes = b"", command_line: bytes = b""
    ) -> Decision:
        """Say how much of this crash's memory is kept.

        Args:
            maps: its mappings, proc_pid_maps(5).
            command_line: as the kernel tells it, proc_pid_cmdline(5): of what `process` shows,
                arguments and secrets are left out.
        """
        for rule in self._off:
            if rule.fits(process, username, command_line):
                return Decision(
                    Extent.NOTHING,
                    f"no core for {rule.field}={rule.pattern} ({rule.setting})",
                )
        if self.asks_for_labels and process.container and process.container.name is None:
            return Decision(
                Extent.NOTHING,
                "its container's labels are not known, and they may forbid a core: see "
                "CRASHBUS_RECORDER_RUNTIME_SOCKET and _CRI_SOCKET",
            )
        if self._extent is not Extent.ALL:
            return Decision(self._extent, "CRASHBUS_RECORDER_CORE")
        if self._is_spared(process, maps):
            return Decision(
                Extent.STACKS,
                f"more than {self._burst} crashes of this program within a minute, of which one in "
                f"{self._one_in} keeps all (CRASHBUS_RECORDER_LOOP_BURST)",
            )
        return Decision(Extent.ALL)

    def _is_spared(self, process: Process, maps: bytes) -> bool:
        """Count a crash; tell whether it is one too many of a loop.

        A program is the same in one container, or pod: whoever crashes there on purpose spoils but
        his own. Of several containers it is where the executable is the same file, of their image,
        as in a loop that makes a new container for each crash. Of each the first crash alone counts
        there, so that no one in a container can have the crashes of another's spared.
        """
        if not self._burst:
            return False
        executable, home = process.executable or process.comm, _home(process)
        program = (executable, process.uid, home)
        with self._lock:
            is_first = program not in self._crashes
            is_spared = self._is_one_too_many(program)
            file = _executable_file(process, maps) if home and is_first else None
            if file is not None:
                is_spared |= self._is_one_too_many((executable, process.uid, f"file {file}"))
        return is_spared

    def _is_one_too_many(self, program: _Program) -> bool:
        now = self._clock()
        # Longer than the burst it need not be.
        times = self._crashes.setdefault(program, deque(maxlen=self._burst + 1))
        self._crashes.move_to_end(program)
        times.append(now)
        if len(self._crashes) > _MAX_PROGRAMS:
            forgotten, _ = self._crashes.popitem(last=False)
            self._in_loop.pop(forgotten, None)
        if len(times) <= self._burst or now - times[0] > LOOP_SECONDS:
            self._in_loop.pop(program, None)
            return False
        self._in_loop[program] = count = self._in_loop.get(program, 0) + 1
        return count % self._one_in != 0


def _home(process: Process) -> str:
    """Return what stays the same when a container is started again: its pod, or itself."""
    if process.container is None:
        return ""
    # What follows the container's name is a cgroup that it may have made itself.
    before = (process.cgroup or "").partition(process.container.id)[0]
    pod = _POD.search(before)
    return pod[1] if pod else process.container.id


def _executable_file(process: Process, maps: bytes) -> str | None:
    """Return the inode of the executable, which containers of one image have in common.

    An overlay shows that of the layer below; the device is the container's own,
    Documentation/filesystems/overlayfs.rst.
    """
    for one in mappings(maps[:_FIRST_MAPPINGS]):
        if one.inode != b"0" and names.text(one.path) == process.executable:
            return one.inode.decode("ascii", "replace")
    return None
