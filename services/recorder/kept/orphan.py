"""A crash that the pipe helper kept, read from what it left.

Some of /proc/<pid>, the core, and ``end``, which says why the core is not whole. All of it was
written by root, but tells what a crashed process wanted told.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from crashbus import layout, names
from crashbus.layout import Kind
from crashbus.parts import Process
from services.common import crash_directory, unrecorded
from services.common import process as processes
from services.common.proc import Proc
from services.common.resources import Resources
from services.recorder import facts, modules
from services.recorder.core import core_head
from services.recorder.core.core_head import Head
from services.recorder.errors import CaptureFailed
from services.recorder.facts import Facts, Task
from services.recorder.unwinding import fault_address

CORE = "core"
LOST = "the recorder was killed before it had written what it had read"  # `left_behind`
_ADOPTED = "adopted"  # file that says that crash files were begun, and the core is with them
_TRIED = "tried"  # file that says that a recorder has begun to read it
_NO_CORE = ("no memory may be kept", LOST)  # the first as the helper puts it
_WHY = "no recorder took it, so its pipe helper kept it: no sockets and open files are known"
_MAX_SMALL = 256 * 1024  # bytes, as in the helper
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
CRASH = re.compile(rb"(\d{1,10}) (\d{1,10}) (\d{1,2}) (\d{1,12})\n")
# What reading something damaged raises.
_DAMAGED = (ValueError, KeyError, IndexError, OverflowError, ProcessLookupError)


class Unreadable(CaptureFailed):
    """Who crashed cannot be told, now or later."""


@dataclass(frozen=True)
class Orphan:
    """A crash that was kept.

    Attributes:
        directory: descriptor of what the helper left.
        command_line: secrets and all, proc_pid_cmdline(5).
        core_fault: why its core is not whole, empty if it is.
    """

    directory: int
    process: Process
    signal: int
    crashed_at: float
    facts: Facts
    head: Head
    core: int
    core_size: int
    core_fault: str
    fault: str | None
    command_line: bytes = field(repr=False)

    @property
    def has_memory(self) -> bool:
        """Whether its memory might be kept."""
        return self.core >= 0 and self.core_fault not in _NO_CORE

    def give_core(self, crash: int, epoch: int) -> None:
        """Move the core to its place among the crash files, at one blow: it is here or there.

        Raises:
            OSError: it cannot have that place.
        """
        os.close(crash_directory.create_file(crash, Kind.CORE, epoch))  # which others cannot take
        name = layout.crash_file_name(Kind.CORE, epoch)
        os.rename(CORE, name, src_dir_fd=self.directory, dst_dir_fd=crash)

    def take_core_back(self, crash: int, epoch: int) -> None:
        """Undo `give_core`."""
        name = layout.crash_file_name(Kind.CORE, epoch)
        os.rename(name, CORE, src_dir_fd=crash, dst_dir_fd=self.directory)

    def is_adopted(self) -> None:
        """Say that nothing but rest is left here."""
        _mark(self.directory, _ADOPTED)

    def close(self) -> None:
        """Close its files, if nobody adopts it."""
        self.facts.close()
        if self.core >= 0:
            os.close(self.core)


def read(directory: int) -> Orphan:
    """Read what the helper left; the descriptors in it become the caller's.

    Raises:
        Unreadable: who crashed cannot be told.
    """
    core = _open(directory, CORE)
    try:
        return _orphan(directory, core)
    except BaseException as error:
        if core >= 0:
            os.close(core)
        if not isinstance(error, _DAMAGED):
            raise
        raise Unreadable(
            "capture_failed",
            f"what the pipe helper kept of a crash cannot be read: {error}",
            f"look into {layout.ORPHANS} in CRASHBUS_SPOOL",
        ) from error


def is_there(directory: int) -> bool:
    """Tell whether the helper has begun to write."""
    return _exists(directory, "crash")


def is_left(spool: Path, pid: int, crash_id: str | None = None) -> bool:
    """Tell whether there is still something kept of a crash of this PID; None: of any."""
    places = (spool / layout.ORPHANS).glob(f"[0-9]*-{pid}")
    return any(crash_id in (None, _crash_id(place)) for place in places)


def _crash_id(place: Path) -> str:
    """Return which crash was kept; empty where that cannot be told."""
    try:
        directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        kept = _Kept(directory)
        told = {name: kept.read(name) for name in ("crash", "boot_id", "stat")}
        return unrecorded.name_of(told) or ""
    finally:
        os.close(directory)


def was_adopted(directory: int) -> bool:
    """Tell whether crash files were begun of it: its set is there, perhaps cut short."""
    return _exists(directory, _ADOPTED)


def was_tried(name: str, orphans: int) -> bool:
    """Tell whether one was tried and is still there: what it mapped may lie on a dead disk."""
    return _exists(orphans, f"{name}/{_TRIED}")


def is_tried(directory: int) -> None:
    """Say that it is tried now."""
    with suppress(OSError):  # no room: then it may be tried before others
        _mark(directory, _TRIED)


class _Kept(Proc):
    """/proc/<pid> as the helper kept it, without threads: by the last part of each name.

    Args:
        directory: descriptor of what the helper left.
    """

    def __init__(self, directory: int) -> None:
        self._directory = directory

    def read(self, name: str, limit: int = _MAX_SMALL) -> bytes:
        descriptor = _open(self._directory, name.rpartition("/")[2])
        if descriptor < 0:
            return b""
        with os.fdopen(descriptor, "rb") as file:
            return file.read(limit)

    def link(self, name: str) -> bytes | None:
        try:
            return os.readlink(name.rpartition("/")[2].encode(), dir_fd=self._directory)
        except OSError:
            return None


def _orphan(directory: int, core: int) -> Orphan:
    kept = _Kept(directory)
    crash = CRASH.fullmatch(kept.read("crash"))
    if not crash:
        raise ValueError("it does not say who crashed")
    pid, _, number, at = (int(part) for part in crash.groups())
    process = processes.read_process(pid, names.text(kept.read("boot_id")).strip(), kept)
    maps = kept.read("maps", facts.MAX_MAPS)
    size = os.fstat(core).st_size if core >= 0 else 0
    head = _head(core)
    told = names.text(kept.read("end")) if _exists(directory, "end") else "it was killed"
    core_fault = _core_fault(told, size, head)
    known = _facts(kept, process, LOST if core_fault == LOST else _WHY)
    orphan = Orphan(
        directory=directory,
        process=process,
        signal=number if number <= 64 else 0,
        crashed_at=float(at),
        facts=known,
        head=head,
        core=core,
        core_size=size,
        core_fault=core_fault,
        fault=_fault(maps, head),
        command_line=processes.raw_command_line(pid, kept),
    )
    # Last: they are open from here on.
    return replace(orphan, facts=replace(known, modules=modules.read_later(maps)))


def _core_fault(told: str, size: int, head: Head) -> str:
    if not told and head.size is not None and size < head.size:
        told = "the process was killed while it dumped"
    if not told or told in _NO_CORE:
        return told
    missing = f"{head.size - size} of {head.size} bytes are missing: " if head.size else ""
    return f"{missing}kept by the pipe helper until {told}"


def _fault(maps: bytes, head: Head) -> str | None:
    address = head.cause.fault_address if head.cause else None
    return fault_address.describe(maps, address) if maps and address is not None else None


def _head(core: int) -> Head:
    if core < 0:
        return Head(b"", fault="no core came")
    with os.fdopen(os.dup(core), "rb") as file:
        return core_head.read(file.read)


def _facts(kept: _Kept, process: Process, why: str) -> Facts:
    environment, _ = facts.whole_variables(kept.read("environ", facts.MAX_ENVIRONMENT + 1))
    return Facts(
        process=process,
        username=facts.username(process.uid),
        raw_environment=environment,
        cwd=_text(kept.link("cwd")),
        root=_text(kept.link("root")),
        limits=facts.parse_limits(names.text(kept.read("limits"))),
        threads=_threads(kept.read("tasks")),
        modules=(),
        notes=(why,),
        resources=Resources(
            status=kept.read("status"),
            mounts=kept.read("mountinfo"),
            oom_score_adj=kept.read("oom_score_adj"),
        ),
    )


def _text(target: bytes | None) -> str | None:
    return None if target is None else names.text(target)


def _threads(tasks: bytes) -> tuple[Task, ...]:
    """Return the threads; their statuses follow each other, each begins with a name."""
    found = []
    for raw in re.split(rb"(?m)^(?=Name:\t)", tasks):
        status = processes.status_in(raw)
        with suppress(KeyError, ValueError, IndexError):  # the last may be cut
            tid = int(status["Pid"])
            found.append(Task(tid, int(status.get("NSpid", str(tid)).split()[-1]), status["Name"]))
    return tuple(found)


def _open(directory: int, name: str) -> int:
    try:
        return os.open(name, _FLAGS if name != CORE else _FLAGS | os.O_RDWR, dir_fd=directory)
    except OSError:
        return -1


def _mark(directory: int, name: str) -> None:
    with suppress(FileExistsError):
        os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory))


def _exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True
