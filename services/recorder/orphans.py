"""Crashes that the pipe helper kept because no recorder took them: made crash files of.

Those that a killed recorder had taken and not written come the same way, `left_behind`.

The helper leaves a directory for each, ``<spool>/.orphans/<time>-<pid>``, locked while it writes
it: some of /proc/<pid>, the core, and ``end``, which says why the core is not whole. All of it was
written by root, but tells what a crashed process wanted told.
"""

import fcntl
import os
import pwd
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from crashbus import identity, layout, names
from crashbus.fields import MAX_PATH
from crashbus.layout import Kind
from crashbus.parts import Process
from services.common import crash_directory
from services.common import process as processes
from services.common.proc import mappings
from services.common.resources import Resources
from services.recorder import core_head, facts, fault_address
from services.recorder.core_head import Head
from services.recorder.errors import CaptureFailed
from services.recorder.facts import Facts, Module, Task

log: structlog.stdlib.BoundLogger = structlog.get_logger()

CORE = "core"
_ADOPTED = "adopted"  # file that says that crash files were begun, and the core is with them
NO_MEMORY = "no memory may be kept"  # as the helper puts it
LOST = "the recorder was killed before it had written what it had read"  # `left_behind`
_NO_CORE = (NO_MEMORY, LOST)
WHY = "no recorder took it, so its pipe helper kept it: no sockets and open files are known"
_LOOK_EVERY = 5.0  # seconds
_MADE_WITHIN = 60.0  # seconds from a helper's directory to the first file in it
_MAX_SMALL = 256 * 1024  # bytes, as in the helper
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NAME = re.compile(r"(\d{1,12})-(\d{1,10})")
CRASH = re.compile(rb"(\d{1,10}) (\d{1,10}) (\d{1,2}) (\d{1,12})\n")


class Unreadable(CaptureFailed):
    """Who crashed cannot be told, now or later."""


@dataclass(frozen=True)
class Orphan:
    """One of them.

    Attributes:
        directory: descriptor of what the helper left.
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

    @property
    def has_memory(self) -> bool:
        """Whether its memory might be kept."""
        return self.core >= 0 and self.core_fault not in _NO_CORE

    def give_core(self, crash: int, epoch: int) -> None:
        """Move the core to its place among the crash files.

        Raises:
            OSError: it cannot have that place.
        """
        crash_directory.adopt_file(CORE, self.directory, Kind.CORE, epoch, crash)

    def is_adopted(self) -> None:
        """Say that nothing but rest is left here."""
        with suppress(FileExistsError):
            os.close(os.open(_ADOPTED, os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.directory))

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
        if not isinstance(error, ValueError | KeyError | IndexError | OverflowError):
            raise
        raise Unreadable(
            "capture_failed",
            f"what the pipe helper kept of a crash cannot be read: {error}",
            f"look into {layout.ORPHANS} in CRASHBUS_SPOOL",
        ) from error


def _orphan(directory: int, core: int) -> Orphan:
    crash = CRASH.fullmatch(_read(directory, "crash"))
    if not crash:
        raise ValueError("it does not say who crashed")
    pid, _, number, at = (int(part) for part in crash.groups())
    process = _process(directory, pid)
    maps = _read(directory, "maps", facts.MAX_MAPS)
    size = os.fstat(core).st_size if core >= 0 else 0
    head = _head(core)
    core_fault = _core_fault(directory, size, head)
    known = _facts(directory, process, LOST if core_fault == LOST else WHY)
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
    )
    # Last: they are open from here on.
    return replace(orphan, facts=replace(known, modules=_modules(maps)))


def _core_fault(directory: int, size: int, head: Head) -> str:
    told = names.text(_read(directory, "end")) if _exists(directory, "end") else "it was killed"
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


def _process(directory: int, pid: int) -> Process:
    status = processes.status_in(_read(directory, "status"))
    group = processes.cgroup_in(_read(directory, "cgroup"))
    executable = _link(directory, "exe")
    return Process(
        boot_id=names.text(_read(directory, "boot_id")).strip(),
        pid=pid,
        ns_pid=int(status.get("NSpid", str(pid)).split()[-1]),
        start_ticks=identity.start_ticks_in(_read(directory, "stat")),
        uid=int(status["Uid"].split()[0]),
        gid=int(status["Gid"].split()[0]),
        comm=names.text(_read(directory, "comm").rstrip(b"\n")),
        executable=executable and executable[:MAX_PATH],
        command_line=processes.split_arguments(_read(directory, "cmdline")),
        cgroup=group,
        container=processes.container_of(group),
    )


def _facts(directory: int, process: Process, why: str) -> Facts:
    environment = _read(directory, "environ", facts.MAX_ENVIRONMENT + 1)
    if len(environment) > facts.MAX_ENVIRONMENT:
        environment = environment.rpartition(b"\0")[0]  # half a variable may be half a secret
    return Facts(
        process=process,
        username=_username(process.uid),
        raw_environment=environment,
        cwd=_link(directory, "cwd"),
        root=_link(directory, "root"),
        limits=facts.parse_limits(names.text(_read(directory, "limits"))),
        threads=_threads(_read(directory, "tasks")),
        modules=(),
        notes=(why,),
        resources=Resources(
            status=_read(directory, "status"),
            mounts=_read(directory, "mountinfo"),
            oom_score_adj=_read(directory, "oom_score_adj"),
        ),
    )


def _username(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _threads(tasks: bytes) -> tuple[Task, ...]:
    """Return the threads; their statuses follow each other, each begins with a name."""
    found = []
    for raw in re.split(rb"(?m)^(?=Name:\t)", tasks):
        status = processes.status_in(raw)
        with suppress(KeyError, ValueError, IndexError):  # the last may be cut
            tid = int(status["Pid"])
            found.append(Task(tid, int(status.get("NSpid", str(tid)).split()[-1]), status["Name"]))
    return tuple(found)


def _modules(maps: bytes) -> tuple[Module, ...]:
    """Return what was mapped as code; opened where the very file still has its path here."""
    places: dict[str, tuple[bytes, bytes]] = {}
    for one in mappings(maps):
        places.setdefault(names.text(one.path), (one.device, one.inode))
    found, files = [], 0
    for path, start, end, _ in facts.parse_maps(maps):
        opened = _same_file(path, *places[path]) if files < 64 else -1
        files += opened >= 0
        found.append(Module(path, start, end, opened))
    return tuple(found)


def _same_file(path: str, device: bytes, inode: bytes) -> int:
    """Open a file if it is the one with this device and inode; -1 if not."""
    try:
        if not _is(Path(path).stat(), device, inode):
            return -1
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError, OverflowError):  # no such device can be
        return -1
    with suppress(OSError):
        if _is(os.fstat(opened), device, inode):
            return opened
    os.close(opened)
    return -1


def _is(status: os.stat_result, device: bytes, inode: bytes) -> bool:
    major, _, minor = device.partition(b":")
    expected = os.makedev(int(major, 16), int(minor, 16)), int(inode)
    return stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) == expected


def _open(directory: int, name: str) -> int:
    try:
        return os.open(name, _FLAGS if name != CORE else _FLAGS | os.O_RDWR, dir_fd=directory)
    except OSError:
        return -1


def _exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True


def _read(directory: int, name: str, limit: int = _MAX_SMALL) -> bytes:
    descriptor = _open(directory, name)
    if descriptor < 0:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        return file.read(limit)


def _link(directory: int, name: str) -> str | None:
    try:
        return names.text(os.readlink(name.encode(), dir_fd=directory))
    except OSError:
        return None


def _put_aside(name: str, orphans: int) -> None:
    """Keep what cannot be read for a human; of those with the same name the newest."""
    aside = f"unreadable-{name}"
    with suppress(FileNotFoundError):
        shutil.rmtree(aside, dir_fd=orphans)
    os.rename(name, aside, src_dir_fd=orphans, dst_dir_fd=orphans)


class Orphans:
    """Looks for them, at the start and from then on, in a thread of its own.

    Args:
        spool: where crash files go.
        adopt: makes crash files of one; when it raises something, it is tried again later.
        failed: told of one that cannot be read.
    """

    def __init__(
        self,
        spool: Path,
        adopt: Callable[[Orphan], None],
        failed: Callable[[CaptureFailed], None],
    ) -> None:
        self._spool = spool
        self._adopt = adopt
        self._failed = failed
        self._is_prepared = False
        self._stopping = threading.Event()
        # A daemon: what a crashed process mapped may lie on a disk that does not answer.
        self._thread = threading.Thread(target=self._run, name="orphans", daemon=True)

    def prepare(self) -> Path:
        """Make the directory that the helper writes to, and return the spool's true path.

        Raises:
            SpoolUnusable, OSError: it cannot be made.
        """
        os.close(self._open())
        self._is_prepared = True
        return self._spool.resolve()

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self, within: float) -> None:
        """Take no other; wait for the one in hand."""
        self._stopping.set()
        if self._thread.is_alive():  # a recorder that could not start stops, too
            self._thread.join(within)

    def _open(self) -> int:
        spool = crash_directory.open_spool(self._spool)
        try:
            return crash_directory.private_directory(layout.ORPHANS, spool)
        finally:
            os.close(spool)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - one look must not end the others
                log.warning("crashes kept by the pipe helper wait", because=str(error))
            self._stopping.wait(_LOOK_EVERY)

    def _look(self) -> None:
        if not self._is_prepared and not (self._spool / layout.ORPHANS).exists():
            return
        orphans = self._open()
        try:
            with os.scandir(orphans) as entries:
                found = sorted(entry.name for entry in entries)
            for name in found:
                if _NAME.fullmatch(name) and not self._stopping.is_set():
                    self._try_to_take(name, orphans)
        finally:
            os.close(orphans)

    def _try_to_take(self, name: str, orphans: int) -> None:
        try:
            self._take(name, orphans)
        except Exception as error:  # noqa: BLE001 - one must not keep those behind it waiting
            log.warning("a crash kept by the pipe helper waits", name=name, because=str(error))

    def _take(self, name: str, orphans: int) -> None:
        directory = os.open(name, os.O_DIRECTORY | _FLAGS, dir_fd=orphans)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            age = time.time() - os.fstat(directory).st_mtime
            if not _exists(directory, "crash") and age < _MADE_WITHIN:
                return  # just made, and not locked yet
            # A recorder may have died after that: its set is there, cut short.
            if not _exists(directory, _ADOPTED):
                self._adopt(read(directory))
        except BlockingIOError:
            return  # its helper still writes it
        except Unreadable as failure:
            self._failed(failure)
            _put_aside(name, orphans)
            return
        finally:
            os.close(directory)
        shutil.rmtree(name, dir_fd=orphans)
