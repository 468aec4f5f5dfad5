"""Gathering: finds sets of crash files in the spool and enters them in the ledger.

A directory is looked at whenever something in it changes (inotify), when a process that was
waited for ends, and from time to time, because notifications can be lost; inotify(7).
"""

import asyncio
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import asyncinotify
import structlog
from asyncinotify import Inotify, Mask

from crashbus import capture, signals
from crashbus.bus import Bus
from crashbus.capture import CaptureRecord, UnreadableRecord
from crashbus.errors import BusUnreachable
from crashbus.identity import crash_id
from crashbus.layout import Kind
from crashbus.messages import Process, SignalEvent
from crashbus.names import token
from services.collector import judge, metrics, processes, spool
from services.collector.judge import RecordState, Verdict
from services.collector.ledger import Crash, Ledger, Source
from services.collector.spool import Entry, Refused

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_AGAIN = 5.0  # seconds between rounds over directories that may have changed unseen
MAX_SMALL_FILE = 64 * 1024  # read of cfg, info and backtrace to judge a set
_PID = re.compile(r"[1-9]\d{0,9}")
_CHANGES = Mask.CREATE | Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.ONLYDIR | Mask.DONT_FOLLOW


@dataclass(frozen=True)
class FoundSet:
    """A set of files of one epoch, as it was seen.

    Attributes:
        record: what the recorder says of it; None for a set that AppScope made.
        writer: the process that made it, if that still lives.
    """

    directory: str
    epoch: int
    entries: dict[Kind, Entry]
    verdict: Verdict
    record: RecordState | None
    writer: Process | None
    cause: judge.Cause | None
    comm: str


class Gatherer:
    """Watches the spool.

    Args:
        root: the spool, such as ``/tmp/appscope``.
        on_crash: called with each crash that is new or has new files.
        on_ready: called once nothing new can be overlooked.
    """

    def __init__(
        self,
        root: Path,
        host: str,
        boot_id: str,
        destinations: tuple[str, ...],
        ledger: Ledger,
        bus: Bus,
        on_crash: Callable[[Crash], None],
        on_ready: Callable[[], None],
    ) -> None:
        self.root = root
        self._host = host
        self._boot_id = boot_id
        self._destinations = destinations
        self._ledger = ledger
        self._bus = bus
        self._on_crash = on_crash
        self._on_ready = on_ready
        self._settled: dict[str, int] = {}  # directory to its mtime when nothing was left to do
        self._reported: set[tuple[str, str]] = set()  # what was refused, said once
        self._waiting: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._watched: dict[asyncinotify.Watch, str] = {}
        self._changed: set[str] = set()
        self._being_captured: dict[tuple[str, int], str] = {}
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        await asyncio.to_thread(make_spool, self.root)
        with Inotify() as inotify:
            watch = inotify.add_watch(self.root, _CHANGES)
            self._on_ready()
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._notice(inotify, watch), name="notice")
                    tasks.create_task(self._rounds(inotify), name="rounds")
                    tasks.create_task(self._look_at_changed(), name="look")
            finally:
                for task in self._waiting.values():
                    task.cancel()

    async def _notice(self, inotify: Inotify, root: asyncinotify.Watch) -> None:
        """Note which directories change."""
        async for event in inotify:
            if event.watch is None:
                continue
            if Mask.IGNORED in event.mask:
                self._watched.pop(event.watch, None)
                continue
            name = str(event.name) if event.watch is root else self._watched.get(event.watch)
            if name is None or not _PID.fullmatch(name):
                continue
            if event.watch is root:
                self._watch(inotify, name)
            self._changed.add(name)
            self._wake.set()

    async def _look_at_changed(self) -> None:
        """Look once at each directory that changed, however often it did."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._changed:
                await self.look(self._changed.pop())

    def _watch(self, inotify: Inotify, name: str) -> None:
        if name in self._watched.values():
            return
        try:
            self._watched[inotify.add_watch(self.root / name, _CHANGES)] = name
        except OSError as error:  # gone again, no directory, or no watches left: rounds go on
            log.debug("directory is not watched", directory=name, error=str(error))

    async def _rounds(self, inotify: Inotify) -> None:
        while True:
            for name, changed in await asyncio.to_thread(self._directories):
                if self._settled.get(name) != changed:
                    self._watch(inotify, name)
                    await self.look(name)
            await asyncio.sleep(LOOK_AGAIN)

    def _directories(self) -> list[tuple[str, int]]:
        """Return the names of all ``<pid>`` directories with their times of change."""
        found = []
        with os.scandir(self.root) as entries:
            for entry in entries:
                if _PID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    try:
                        found.append((entry.name, entry.stat(follow_symlinks=False).st_mtime_ns))
                    except FileNotFoundError:
                        continue
        known = {name for name, _ in found}
        self._settled = {n: t for n, t in self._settled.items() if n in known}
        return found

    def is_being_captured(self, crash_id: str) -> bool:
        """Tell whether the recorder was still writing a crash's files at the last look."""
        return crash_id in self._being_captured.values()

    async def look(self, directory: str) -> bool:
        """Look at one ``<pid>`` directory and enter what is whole there.

        Returns:
            False after a fault of the bus or of the disk, which leaves it for the next round.
        """
        async with self._locks.setdefault(directory, asyncio.Lock()):
            try:
                await self._look(directory)
            except FileNotFoundError:
                self._locks.pop(directory, None)
            except (BusUnreachable, OSError) as error:
                log.warning("will look again", directory=directory, error=str(error))
                return False
        return True

    async def _look(self, directory: str) -> None:
        changed, found = await asyncio.to_thread(self._examine, directory)
        settled = True
        for one in found:
            self._being_captured.pop((directory, one.epoch), None)
            if one.verdict is Verdict.WAIT:
                settled = False
                if one.record and one.record.record:
                    self._being_captured[directory, one.epoch] = one.record.record.crash_id
                self._look_when_gone(one)
            else:
                await self._enter(one)
        if settled:
            self._settled[directory] = changed

    def _look_when_gone(self, found: FoundSet) -> None:
        """Look again when the writer of a set has ended."""
        key = (found.directory, found.epoch)
        if found.writer is None or key in self._waiting:
            return
        writer = found.writer

        async def wait() -> None:
            await processes.gone(writer.pid, writer.start_ticks)
            del self._waiting[key]
            await self.look(found.directory)

        self._waiting[key] = asyncio.create_task(wait(), name=f"wait for {writer.pid}")

    def _examine(self, directory: str) -> tuple[int, list[FoundSet]]:
        with (
            spool.open_directory(str(self.root)) as root,
            spool.open_directory(directory, root) as descriptor,
        ):
            changed = os.fstat(descriptor).st_mtime_ns
            listing = spool.list_directory(descriptor)
            for refused in listing.refused:
                self._refuse(directory, refused)
            found = [
                self._judge(directory, descriptor, epoch, entries)
                for epoch, entries in listing.sets.items()
                if any(not self._is_entered(directory, e) for e in entries.values())
            ]
        return changed, found

    def _is_entered(self, directory: str, entry: Entry) -> bool:
        return entry.kind is Kind.CAPTURE or self._ledger.knows_file(directory, entry.name)

    def _refuse(self, directory: str, refused: Refused) -> None:
        key = (directory, str(refused))
        if key not in self._reported:
            if len(self._reported) > 10_000:  # an attacker's names are not kept for ever
                self._reported.clear()
            self._reported.add(key)
            metrics.REFUSED.labels(refused.reason).inc()
            log.warning("refused", directory=directory, reason=refused.reason, error=str(refused))

    def _judge(
        self, directory: str, descriptor: int, epoch: int, entries: dict[Kind, Entry]
    ) -> FoundSet:
        record = _record(descriptor, entries.get(Kind.CAPTURE))
        files: dict[Kind, Entry] = {
            kind: entry for kind, entry in entries.items() if kind is not Kind.CAPTURE
        }
        if record is not None:
            verdict = judge.judge_recorded(record)
            return FoundSet(directory, epoch, files, verdict, record, None, None, "unknown")
        writer = processes.writer_of(int(directory), epoch, self._boot_id)
        open_files = spool.open_by_process(writer.pid) if writer else set()
        verdict = judge.judge_appscope(
            present=files.keys(),
            held_open={k for k, entry in files.items() if entry.identity in open_files},
            promised=judge.promised_kinds(_content(descriptor, files.get(Kind.CFG))),
            process_alive=writer is not None,
        )
        return FoundSet(
            directory,
            epoch,
            files,
            verdict,
            None,
            writer,
            judge.cause_of(_content(descriptor, files.get(Kind.BACKTRACE))),
            judge.process_name(_content(descriptor, files.get(Kind.INFO))) or "unknown",
        )

    async def _enter(self, found: FoundSet) -> None:
        """Enter a set in the ledger, under the crash it belongs to."""
        crash = await self._crash_of(found)
        entered = False
        for entry in found.entries.values():
            if self._ledger.knows_file(found.directory, entry.name):
                continue
            if entry.uid not in (0, crash.process.uid):
                text = f"{entry.name!r} belongs to UID {entry.uid}, not to the crashed process"
                self._refuse(found.directory, Refused("foreign_owner", text))
                continue
            note = _note(found, entry)
            crash.sources[entry.name] = Source(
                directory=found.directory, name=entry.name, kind=entry.kind, note=note
            )
            entered = True
        if not entered:
            return
        crash.delivered_at = None
        if found.verdict is Verdict.CUT_SHORT:
            metrics.CUT_SHORT.inc()
            note = f"the set of {found.epoch} is cut short: its writer is gone"
            if note not in crash.notes:
                crash.notes.append(note)
        await self._ledger.save(crash)
        metrics.CRASHES.labels("appscope" if found.record is None else "recorder").inc()
        log.info(
            "gathered",
            crash_id=crash.crash_id,
            process=crash.process.comm,
            files=len(crash.sources),
        )
        self._on_crash(crash)

    async def _crash_of(self, found: FoundSet) -> Crash:
        record = found.record.record if found.record else None
        if record is not None:
            return self._ledger.get(record.crash_id) or self._from_record(record)
        process = found.writer or await self._seen_by_detector(found)
        notes = []
        if process is None:
            owner = min(entry.uid for entry in found.entries.values())
            process = processes.unknown(
                int(found.directory), found.epoch, owner, found.comm, self._boot_id
            )
            notes.append("the process was gone before anyone saw it: its start is not known")
        name = crash_id(process.boot_id, process.pid, process.start_ticks)
        cause = found.cause
        return self._ledger.get(name) or Crash(
            crash_id=name,
            host=self._host,
            crashed_at=float(found.epoch),
            process=process,
            signal=cause.signal if cause else 0,
            signal_name=signals.name(cause.signal) if cause else "unknown",
            code_meaning=cause.meaning if cause else None,
            fault_address=cause.fault_address if cause else None,
            destinations=self._destinations,
            notes=notes,
        )

    def _from_record(self, record: CaptureRecord) -> Crash:
        return Crash(
            host=self._host,
            destinations=self._destinations,
            notes=list(record.notes),
            **record.model_dump(exclude={"state", "files", "notes", "host"}),
        )

    async def _seen_by_detector(self, found: FoundSet) -> Process | None:
        """Ask the bus which process took a signal when the set was made."""
        since = found.epoch - processes.EVENT_BEFORE
        if since > time.time():
            return None
        events = await self._bus.stored(SignalEvent, f"crash.signal.{token(self._host)}.>", since)
        return processes.from_events(int(found.directory), found.epoch, events)


def make_spool(root: Path) -> None:
    """Make the spool as AppScope's library needs it: any user may make a directory in it."""
    try:
        root.mkdir(parents=True)
    except FileExistsError:
        return
    root.chmod(0o1777)


def _record(directory: int, entry: Entry | None) -> RecordState | None:
    """Read a set's capture record; one that is not root's is no record."""
    if entry is None or entry.uid != 0:
        return None
    try:
        descriptor = spool.open_file(entry.name, directory)
    except (Refused, FileNotFoundError):
        return None
    try:
        being_written = capture.is_being_written(descriptor)
        return RecordState(capture.read(descriptor), being_written)
    except UnreadableRecord:
        return RecordState(None, being_written)
    finally:
        os.close(descriptor)


def _content(directory: int, entry: Entry | None) -> bytes:
    """Return the head of a small file; empty where it cannot be read."""
    if entry is None:
        return b""
    try:
        descriptor = spool.open_file(entry.name, directory)
    except (Refused, FileNotFoundError):
        return b""
    try:
        return os.pread(descriptor, MAX_SMALL_FILE, 0)
    finally:
        os.close(descriptor)


def _note(found: FoundSet, entry: Entry) -> str | None:
    """Return why a file is incomplete; None when it is whole."""
    record = found.record.record if found.record else None
    captured = record.files.get(entry.name) if record else None
    if captured is not None and captured.truncated:
        return captured.note or "cut short by the recorder"
    if captured is not None and captured.size != entry.size:
        return f"{entry.size} bytes, {captured.size} were written"
    if found.verdict is Verdict.CUT_SHORT and entry.kind in judge.doubtful(found.entries.keys()):
        return "its writer ended before it was whole"
    return None
