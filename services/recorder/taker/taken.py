"""What was read at once of a small process, see `taking`."""

import ctypes
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

from services.common import resources
from services.common.proc import Remembered
from services.common.resources import Resources
from services.recorder import facts
from services.recorder.core import core_head
from services.recorder.core.core_head import Head
from services.recorder.core.core_memory import Kept
from services.recorder.taker.taker_library import ABSENT, FILES, Crash

_NUMBER = struct.Struct("=I")


@dataclass
class Taken:
    """What was read of a process before anything was written.

    Attributes:
        proc: its /proc, as far as it was read.
        head: of its core, with all headers and notes; None: it is still to be read.
        memory: all of it; None: the process is still held.
        code: at the program counter, if that is where it faulted.
        files: what it mapped as code, open, by name in proc_pid_map_files(5).
        note: removes the note about it, until record and draft tell as much.
    """

    proc: Remembered = field(default_factory=Remembered)
    head: Head | None = None
    memory: Kept | None = None
    resources: Resources | None = None
    code: bytes | None = None
    files: dict[str, int] | None = None
    note: Callable[[], None] | None = None
    give_back: list[Callable[[], None]] = field(default_factory=list)

    def is_recorded(self) -> None:
        """Say that record and draft are there."""
        if self.note is not None:
            self.note()
            self.note = None

    def close(self) -> None:
        """Give back what nobody took."""
        self.is_recorded()
        for one in self.give_back:
            one()
        self.give_back = []
        for file in (self.files or {}).values():
            os.close(file)
        self.files = None

    def take_files(self) -> dict[str, int] | None:
        """Return the open files, which are the caller's then; None: none were opened yet."""
        files, self.files = self.files, None
        return files


class Told:
    """What was read of /proc, in the order in which taker.so puts it into the arena."""

    def __init__(self, crash: Crash, mounts: bytes) -> None:
        self._raw = ctypes.string_at(crash.arena, crash.used)
        self._place = 0
        self._sockets: tuple[dict[str, Any], ...] = ()
        self._files = {"status": self._file()}
        self._links = {"exe": self._content()}
        self._files["maps"] = self._file()
        self._files["cgroup"] = self._file()
        self._links |= {name: self._content() for name in ("ns/mnt", "root")}
        seen = self._content()
        self._files["mountinfo"] = mounts if seen is None else seen
        self._threads = [
            (self._file().decode(), self._file(), self._file()) for _ in range(self._number())
        ]
        self._files |= {name: self._file() for name, _ in FILES}
        self._links["cwd"] = self._content()
        open_files = [(int(self._file()), self._content()) for _ in range(self._number())]
        self._more_files = len(open_files) > resources.MAX_FILES
        self._open_files = {n: to for n, to in open_files[: resources.MAX_FILES] if to is not None}
        self._cgroup: dict[str, bytes] = {}
        for files in resources.CGROUP_FILES.values():
            self._cgroup |= {name: raw for name in files if (raw := self._file())}

    def _number(self) -> int:
        (number,) = _NUMBER.unpack_from(self._raw, self._place)
        self._place += _NUMBER.size
        return int(number)

    def _content(self) -> bytes | None:
        """Return what comes next; None: it could not be read."""
        size = self._number()
        if size == ABSENT:
            return None
        begin, self._place = self._place, self._place + size + 1  # a NUL
        return self._raw[begin : begin + size]

    def _file(self) -> bytes:
        return self._content() or b""

    def ask_sockets(self, pid: int) -> None:
        """Ask what is asked through the process, while it is held."""
        self._sockets = tuple(resources.sockets(pid, self._open_files))

    def understand(self, crash: Crash, taken: Taken) -> None:
        """Parse the rest of what was read."""
        pid, proc = crash.pid, taken.proc
        for name, content in self._files.items():
            proc.learn(f"{pid}/{name}", content)
        for name, target in self._links.items():
            proc.learn_link(f"{pid}/{name}", target)
        proc.learn_list(f"{pid}/task", [task for task, *_ in self._threads])
        for task, comm, status in self._threads:
            proc.learn(f"{pid}/task/{task}/comm", comm)
            proc.learn(f"{pid}/task/{task}/status", status)
        taken.resources = self._resources()
        raw = ctypes.string_at(crash.head, crash.head_size)[crash.mark :]
        # It looks at the first notes alone; many threads have more.
        taken.head = replace(core_head.read(BytesIO(raw).read), raw=raw)
        if facts.is_at_fault(taken.head):
            taken.code = bytes(memoryview(crash.code)[: crash.code_size])

    def _resources(self) -> Resources:
        return Resources(
            status=self._files["status"],
            rollup=self._files["smaps_rollup"],
            open_files=self._open_files,
            more_files=self._more_files,
            sockets=self._sockets,
            mounts=self._files["mountinfo"],
            cgroup=self._cgroup,
            oom_score_adj=self._files["oom_score_adj"],
        )
