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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

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

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_AGAIN = 0.05  # seconds between looks while a set is being written
LOOK_IDLY = 1.0  # seconds, later: the library pauses for two after each core
WRITING = 10.0  # seconds after a signal in which its set may still be written
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

    def stop(self) -> None:
        """Watch no longer; `resume` goes on."""
        for task in self._watches.values():
            task.cancel()

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
            while await asyncio.to_thread(watched.look):
                try:
                    if await asyncio.to_thread(watched.copy_whole):
                        busy_until = time.monotonic()
                except (OSError, SpoolUnusable) as error:
                    log.warning("not brought out yet", crash_id=event.crash_id, error=str(error))
                busy = time.monotonic() < busy_until
                await asyncio.sleep(LOOK_AGAIN if busy else LOOK_IDLY)
            await asyncio.to_thread(watched.copy_rest)

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
    """One set inside the container, its files held open from the moment they are seen."""

    epoch: int
    entries: dict[Kind, Entry] = field(default_factory=dict)
    files: dict[Kind, int] = field(default_factory=dict)
    verdict: Verdict = Verdict.WAIT

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
        """Copy the sets that are whole to the spool; tell whether there was one.

        Raises:
            OSError, SpoolUnusable: one could not be copied; nothing of it is left there.
        """
        return self._copy([one for one in self._sets.values() if one.verdict is Verdict.WHOLE])

    def copy_rest(self) -> None:
        """Copy what is left of a process that has ended; raises as `copy_whole` does."""
        self._copy([one for one in self._sets.values() if one.files])

    def _copy(self, sets: list[_Set]) -> bool:
        for one in sets:
            self._copy_set(one)
            one.close()
            del self._sets[one.epoch]
            self._done.add(one.epoch)
        return bool(sets)

    def _copy_set(self, one: _Set) -> None:
        """Copy one set under a capture record."""
        directory, epoch = crash_directory.open_crash(
            self._root, self._event.process.pid, one.epoch
        )
        try:
            descriptor = capture.create(directory, epoch, self._record("writing", {}))
            try:
                captured = self._copy_files(one, directory, epoch)
                capture.write(descriptor, self._record("complete", captured))
            except OSError:
                # It is tried again; until then this would be taken for a set that was cut short.
                for kind in (*one.files, Kind.CAPTURE):
                    with suppress(FileNotFoundError):
                        os.unlink(layout.crash_file_name(kind, epoch), dir_fd=directory)
                raise
            finally:
                os.close(descriptor)
        finally:
            os.close(directory)
        log.info("brought out of a container", crash_id=self._event.crash_id, files=len(captured))

    def _copy_files(self, one: _Set, directory: int, epoch: int) -> dict[str, CapturedFile]:
        doubtful = set() if one.verdict is Verdict.WHOLE else judge.doubtful(one.files.keys())
        captured = {}
        for kind, source in one.files.items():
            most = self._room(directory) if kind in LARGE else MAX_SMALL
            size, whole = _copy(source, directory, kind, epoch, most)
            note = "its writer ended before it was whole" if kind in doubtful else None
            if size < whole:
                why = "for want of room" if kind in LARGE else "as many as are read of its kind"
                note = f"cut to {size} bytes of {whole}, {why}"
            captured[layout.crash_file_name(kind, epoch)] = CapturedFile(
                size=size,
                truncated=note is not None,
                expected=whole if size < whole else None,
                note=note,
            )
        return captured

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


def _copy(source: int, directory: int, kind: Kind, epoch: int, most: int) -> tuple[int, int]:
    """Copy what a file holds, up to `most` bytes of data; its holes stay holes.

    Returns:
        The copy's size, and the file's.
    """
    target = crash_directory.create_file(directory, kind, epoch)
    whole = os.fstat(source).st_size
    try:
        position = 0
        while (start := _data_from(source, position, whole)) < whole and most > 0:
            end = min(os.lseek(source, start, os.SEEK_HOLE), whole, start + most)
            position = _copy_range(source, target, start, end)
            most -= end - start
        os.ftruncate(target, start)
    finally:
        os.close(target)
    return start, whole


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
