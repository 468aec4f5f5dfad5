"""AppScope's files inside a container: brought out while the process still lives.

Its library writes to ``/tmp/appscope/<pid>`` below the process's own root, where nobody
outside looks and which is gone with the container. After the core it sleeps for two seconds;
in that time the files are copied to the spool, with a capture record, and are from then on
like any other set. Nothing is written inside the container.
"""

import asyncio
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog
from pydantic import ValidationError

from crashbus import capture, identity, layout
from crashbus.bus import Bus
from crashbus.capture import CapturedFile, CaptureRecord
from crashbus.errors import BusFull, BusUnreachable
from crashbus.layout import LARGE, Kind
from crashbus.messages import DeadLetter, SignalEvent
from services.collector import judge, metrics, processes, spool
from services.collector.found import MAX_SMALL_FILE
from services.collector.judge import Verdict
from services.collector.publish import MAX_SMALL
from services.collector.spool import Entry, Refused
from services.common import crash_directory
from services.common.crash_directory import SpoolUnusable
from services.common.process import read_process

T = TypeVar("T")

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_AGAIN = 0.05  # seconds between looks while a set is being written
LOOK_IDLY = 1.0  # seconds, later: the library pauses for two after each core
WRITING = 10.0  # seconds after a signal in which its set may still be written
FOR_ROOM = 60.0  # seconds that a set waits for room on the disk before it is cut
AT_ONCE = 256  # processes watched at a time; more are told in the log
_BLOCK = 1024 * 1024
_SETS_AT_ONCE = 16  # of one process, with their files open
_INSIDE = ("tmp", "appscope")


class Containers:
    """Watches the processes in containers whose signals AppScope's library handles.

    A process that recovers is watched until it ends: it may write a set for each signal, of
    which the detector publishes but the first.

    Args:
        root: the spool.
        state: directory for notes of what is watched.
        reserve: percent of the spool's disk that cores leave free.
    """

    def __init__(self, root: Path, host: str, bus: Bus, state: Path, reserve: float) -> None:
        self._root = root
        self._reserve = reserve
        self._host = host
        self._bus = bus
        self._state = state
        self._watches: dict[str, asyncio.Task[None]] = {}

    async def resume(self) -> None:
        """Go on watching what was watched before a restart."""
        for event in await asyncio.to_thread(self._noted):
            self._start(event)

    def _noted(self) -> list[SignalEvent]:
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        events = []
        for path in self._state.glob("*.json"):
            try:
                events.append(SignalEvent.model_validate_json(path.read_bytes()))
            except ValidationError as error:
                log.error("a note of a watch cannot be read", path=str(path), error=str(error))
                path.unlink()
        return events

    async def watch(self, event: SignalEvent) -> None:
        """Bring out every set that the process of this event writes from now on.

        Returns once a restart would not forget it.
        """
        if event.crash_id in self._watches or not await asyncio.to_thread(_is_contained, event):
            return
        if len(self._watches) >= AT_ONCE:
            await self._tell(event, f"more than {AT_ONCE} processes under AppScope at once")
            return
        await asyncio.to_thread(self._note(event).write_text, event.model_dump_json())
        self._start(event)

    async def stop(self) -> None:
        """Watch no longer, once what is being copied is there; `resume` goes on."""
        tasks = list(self._watches.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _note(self, event: SignalEvent) -> Path:
        return self._state / f"{event.crash_id}.json"

    def _start(self, event: SignalEvent) -> None:
        task = asyncio.create_task(self._bring_out(event), name=f"container {event.crash_id}")
        self._watches[event.crash_id] = task
        task.add_done_callback(lambda _: self._watches.pop(event.crash_id, None))

    async def _bring_out(self, event: SignalEvent) -> None:
        try:
            await self._until_it_ends(event)
        except Exception as error:  # nobody awaits this task
            metrics.FAULTS.labels("containers").inc()
            log.exception("cannot bring out of a container", crash_id=event.crash_id)
            await self._tell(event, str(error))
        await asyncio.to_thread(self._note(event).unlink, True)

    async def _until_it_ends(self, event: SignalEvent) -> None:
        with _Watched(event, self._root, self._host, self._reserve) as watched:
            busy_until = time.monotonic() + WRITING
            while await _to_its_end(watched.look):
                if await _to_its_end(watched.copy_whole):
                    busy_until = time.monotonic()
                busy = time.monotonic() < busy_until
                await asyncio.sleep(LOOK_AGAIN if busy else LOOK_IDLY)
            try:
                while await _to_its_end(watched.copy_rest):
                    await asyncio.sleep(LOOK_IDLY)
            finally:  # also when we are stopped: nobody can open these files again
                await _to_its_end(watched.keep_rest)

    async def _tell(self, event: SignalEvent, error: str) -> None:
        letter = DeadLetter(
            host=self._host,
            crash_id=event.crash_id,
            service="collector",
            reason="not_brought_out",
            error=f"AppScope's files inside a container were not brought out: {error}",
            mend="make room on the spool's disk; what the recorder captured is not affected",
        )
        try:
            await self._bus.publish(letter)
        except (BusUnreachable, BusFull) as failure:
            log.error("could not tell", crash_id=event.crash_id, error=str(failure))


async def _to_its_end(work: Callable[[], T]) -> T:
    """Do work in a thread, and wait for its end also when cancelled: it uses open files."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise


def _is_contained(event: SignalEvent) -> bool:
    """Tell whether an event's process is there, is the one it says, and has its own root.

    What the event says of UIDs and PIDs decides what we read as root, so it is not believed.
    """
    given = event.process
    try:
        found = read_process(given.pid, given.boot_id)
    except ProcessLookupError:
        return False
    same = (found.start_ticks, found.uid, found.ns_pid) == (
        given.start_ticks,
        given.uid,
        given.ns_pid,
    )
    return same and given.boot_id == identity.boot_id() and _has_own_root(given.pid)


def _has_own_root(pid: int) -> bool:
    """Tell whether a process has another root than the host's first process.

    Where that may not be looked at, we are no container ourselves and our root is the host's.
    """
    try:
        own = Path(f"/proc/{pid}/root/.").stat()
    except OSError:
        return False
    try:
        host = Path("/proc/1/root/.").stat()
    except OSError:
        host = Path("/").stat()
    return (own.st_dev, own.st_ino) != (host.st_dev, host.st_ino)


@dataclass
class _Set:
    """One set inside the container, its files held open from the moment they are seen.

    Attributes:
        patient_until: time.monotonic() from which on it is cut rather than waits for room.
    """

    epoch: int
    entries: dict[Kind, Entry] = field(default_factory=dict)
    files: dict[Kind, int] = field(default_factory=dict)
    verdict: Verdict = Verdict.WAIT
    patient_until: float | None = None

    @property
    def is_patient(self) -> bool:
        return self.patient_until is None or time.monotonic() < self.patient_until

    def close(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()


class _Watched:
    """The sets of one process in a container, to be copied to the spool.

    Args:
        reserve: percent of the spool's disk that cores leave free.
    """

    def __init__(self, event: SignalEvent, root: Path, host: str, reserve: float) -> None:
        self._event = event
        self._root = root
        self._host = host
        self._reserve = reserve
        self._sets: dict[int, _Set] = {}
        self._done: set[int] = set()
        self._directory: int | None = None  # where the library writes, once it is there

    def __enter__(self) -> "_Watched":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sets.values():
            one.close()
        self._leave()

    def _leave(self) -> None:
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    def look(self) -> bool:
        """Open what is new and judge every set; False once the process has ended."""
        process = self._event.process
        # In this order: what an ended process has written is then all seen.
        alive = self._is_alive()
        if alive:
            self._enter()
        if self._directory is not None:
            with suppress(OSError):
                self._open_new(self._directory)
        held = spool.open_by_process(process.pid) if alive else set()
        for one in self._sets.values():
            cfg = one.files.get(Kind.CFG)
            head = os.pread(cfg, MAX_SMALL_FILE, 0) if cfg is not None else b""
            one.verdict = judge.judge_appscope(
                present=one.files.keys(),
                held_open={k for k, entry in one.entries.items() if entry.identity in held},
                promised=judge.promised_kinds(head),
                process_alive=alive,
            )
        return alive

    def _is_alive(self) -> bool:
        return processes.is_alive(self._event.process.pid, self._event.process.start_ticks)

    def _enter(self) -> None:
        """Open the library's directory anew: at first there is none.

        Once the process has ended, its PID may be another's, whose root is not looked into.
        """
        process = self._event.process
        with suppress(OSError), _directory_inside(process.pid, process.ns_pid) as directory:
            if self._is_alive():
                opened = os.dup(directory)  # where no descriptor is left, the former one stays
                self._leave()
                self._directory = opened

    def _open_new(self, directory: int) -> None:
        for epoch, entries in spool.list_directory(directory).sets.items():
            # Older ones are of another process that had this PID in this container.
            if epoch in self._done or epoch < int(self._event.time) - 1:
                continue
            if len(self._sets) >= _SETS_AT_ONCE and epoch not in self._sets:
                continue
            one = self._sets.setdefault(epoch, _Set(epoch))
            for kind, entry in entries.items():
                if kind not in one.files and kind is not Kind.CAPTURE:
                    self._open(one, entry, directory)

    def _open(self, one: _Set, entry: Entry, directory: int) -> None:
        try:
            descriptor = spool.open_file(entry.name, directory, self._event.process.uid)
        except FileNotFoundError:
            return
        except Refused as error:
            if entry.kind not in one.entries:
                one.entries[entry.kind] = entry  # refused once, said once
                metrics.REFUSED.labels("in_container").inc()
                log.warning("refused", crash_id=self._event.crash_id, error=str(error))
            return
        one.files[entry.kind], one.entries[entry.kind] = descriptor, entry

    def copy_whole(self) -> bool:
        """Copy the sets that are whole to the spool; tell whether one was.

        What cannot be copied yet is left for the next call.
        """
        before = len(self._done)
        self._copy([one for one in self._sets.values() if one.verdict is Verdict.WHOLE])
        return len(self._done) > before

    def copy_rest(self) -> bool:
        """Copy what is left of a process that has ended; tell whether some of it waits for room."""
        self._copy(self._left())
        return any(one.is_patient for one in self._left())

    def keep_rest(self) -> None:
        """Copy what is still left, as far as there is room.

        Raises:
            OSError, SpoolUnusable: of a set nothing could be kept; all others were tried.
        """
        lost: list[OSError | SpoolUnusable] = []
        for one in self._left():
            try:
                self._copy_set(one, as_far_as_possible=True)
            except (OSError, SpoolUnusable) as error:
                lost.append(error)
        if lost:
            raise lost[0]

    def _left(self) -> list[_Set]:
        return [one for one in self._sets.values() if one.files]

    def _copy(self, sets: list[_Set]) -> None:
        for one in sets:
            try:
                self._copy_set(one, as_far_as_possible=not one.is_patient)
            except (OSError, SpoolUnusable) as error:
                if one.patient_until is None:
                    one.patient_until = time.monotonic() + FOR_ROOM
                    crash_id = self._event.crash_id
                    log.warning("not brought out yet", crash_id=crash_id, error=str(error))

    def _copy_set(self, one: _Set, as_far_as_possible: bool) -> None:
        """Copy one set under a capture record, and be done with it.

        Args:
            as_far_as_possible: keep of each file what there is room for.

        Raises:
            OSError, SpoolUnusable: it could not be copied; nothing of it is in the spool.
        """
        directory, epoch = crash_directory.open_crash(
            self._root, self._event.process.pid, one.epoch
        )
        crash_id = self._event.crash_id
        try:
            if not as_far_as_possible:
                # Before anything is made: whoever looks into the spool now would see it vanish.
                self._need_room(one, directory)
            descriptor = capture.create(directory, epoch, self._record("writing", {}))
            try:
                captured = self._copy_files(one, directory, epoch, as_far_as_possible)
                capture.write(descriptor, self._record("complete", captured))
                log.info("brought out of a container", crash_id=crash_id, files=len(captured))
            except OSError as error:
                # An incomplete record says that the set was cut short, which it is not if it is
                # tried again.
                if not as_far_as_possible:
                    _remove(directory, epoch, (*one.files, Kind.CAPTURE))
                    raise
                log.warning("brought out in part", crash_id=crash_id, error=str(error))
            finally:
                os.close(descriptor)
        finally:
            os.close(directory)
        one.close()
        del self._sets[one.epoch]
        self._done.add(one.epoch)

    def _copy_files(
        self, one: _Set, directory: int, epoch: int, as_far_as_possible: bool
    ) -> dict[str, CapturedFile]:
        doubtful = set() if one.verdict is Verdict.WHOLE else judge.doubtful(one.files.keys())
        captured = {}
        # The small ones first: of these all are kept where there is no room for the large one.
        for kind in sorted(one.files, key=lambda kind: os.fstat(one.files[kind]).st_size):
            source, most = one.files[kind], MAX_SMALL
            if kind in LARGE:
                most = self._room(directory)
                if not as_far_as_possible and most < _size_on_disk(source):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            copied = _copy(source, directory, kind, epoch, most)
            if copied.error is not None and not as_far_as_possible:
                raise copied.error
            note = "its writer ended before it was whole" if kind in doubtful else None
            if copied.size < copied.whole:
                note = f"cut to {copied.size} bytes of {copied.whole}, {copied.why(kind)}"
            captured[layout.crash_file_name(kind, epoch)] = CapturedFile(
                size=copied.size,
                truncated=note is not None,
                expected=copied.whole if copied.size < copied.whole else None,
                note=note,
            )
        return captured

    def _need_room(self, one: _Set, directory: int) -> None:
        """Raise OSError unless there is room for a set's large files."""
        large = (file for kind, file in one.files.items() if kind in LARGE)
        if self._room(directory) < sum(map(_size_on_disk, large)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _room(self, directory: int) -> int:
        """Return how many bytes may be written before the disk is at its reserve."""
        disk = os.fstatvfs(directory)
        reserve = int(disk.f_blocks * disk.f_frsize * self._reserve / 100)
        return max(0, disk.f_bavail * disk.f_frsize - reserve)

    def _record(self, state: str, files: dict[str, CapturedFile]) -> CaptureRecord:
        event = self._event
        return CaptureRecord.model_validate(
            {
                "state": state,
                "crash_id": event.crash_id,
                "host": self._host,
                "crashed_at": event.time,
                "process": event.process,
                "signal": event.signal,
                "signal_name": event.signal_name,
                "code": event.code,
                "code_meaning": event.code_meaning,
                "fault_address": event.fault_address,
                "files": files,
                "notes": ("written by AppScope's library inside its container",),
            }
        )


@contextmanager
def _directory_inside(pid: int, ns_pid: int) -> Iterator[int]:
    """Open ``/tmp/appscope/<pid>`` below a process's root, component by component."""
    with ExitStack() as stack:
        # The magic link leads to the process's root; below it no link is followed.
        current = os.open(f"/proc/{pid}/root/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, current)
        for name in (*_INSIDE, str(ns_pid)):
            current = stack.enter_context(spool.open_directory(name, current))
        yield current


def _remove(directory: int, epoch: int, kinds: Iterable[Kind]) -> None:
    for kind in kinds:
        with suppress(FileNotFoundError):
            os.unlink(layout.crash_file_name(kind, epoch), dir_fd=directory)


@dataclass(frozen=True)
class _Copied:
    """A copy of a file.

    Attributes:
        size: bytes of the copy.
        whole: bytes of the file, as it was at the beginning.
        error: what ended the copying too early.
        shrank: whether the file was cut meanwhile.
    """

    size: int
    whole: int
    error: OSError | None
    shrank: bool

    def why(self, kind: Kind) -> str:
        """Tell why the copy is shorter than the file."""
        if self.error is not None:
            return f"{self.error.strerror}"
        if self.shrank:
            return "where its writer cut it meanwhile"
        return "for want of room" if kind in LARGE else "as many as are read of its kind"


def _copy(source: int, directory: int, kind: Kind, epoch: int, most: int) -> _Copied:
    """Copy what a file holds, up to `most` bytes of data; its holes stay holes.

    Raises:
        OSError: the copy cannot be made at all.
    """
    target = crash_directory.create_file(directory, kind, epoch)
    whole = os.fstat(source).st_size
    try:
        size = _copy_data(source, target, whole, most)
        now = os.fstat(source).st_size
        os.ftruncate(target, min(size, now))
        return _Copied(min(size, now), whole, None, now < whole)
    except OSError as error:
        return _Copied(os.fstat(target).st_size, whole, error, False)
    finally:
        os.close(target)


def _copy_data(source: int, target: int, whole: int, most: int) -> int:
    """Copy up to `most` bytes of data and return where the copy ends."""
    position = 0
    while (start := _data_from(source, position, whole)) < whole and most > 0:
        end = min(os.lseek(source, start, os.SEEK_HOLE), whole, start + most)
        position = _copy_range(source, target, start, end)
        most -= end - start
    return start


def _size_on_disk(file: int) -> int:
    """Return how many bytes the data of a file takes, its holes left out."""
    status = os.fstat(file)
    return min(status.st_size, status.st_blocks * 512)


def _data_from(source: int, position: int, size: int) -> int:
    """Return where a file's data goes on; its size where there is only a hole left."""
    try:
        return min(os.lseek(source, position, os.SEEK_DATA), size)
    except OSError as error:
        if error.errno != errno.ENXIO:  # lseek(2)
            raise
        return size


def _copy_range(source: int, target: int, start: int, end: int) -> int:
    while start < end:
        block = os.pread(source, min(_BLOCK, end - start), start)
        if not block:
            break
        view = memoryview(block)
        while view:
            written = os.pwrite(target, view, start)
            view, start = view[written:], start + written
    return end
