"""Gathering: finds sets of crash files in the spool and enters them in the ledger.

A directory is looked at whenever something in it changes (inotify), when a process that was
waited for ends, and from time to time, because notifications can be lost; inotify(7).
"""

import asyncio
import os
import re
import time
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import asyncinotify
import structlog
from asyncinotify import Inotify, Mask

from crashbus import capture, signals
from crashbus.bus import Bus
from crashbus.capture import CapturedFile, CaptureRecord, UnreadableRecord
from crashbus.errors import BusUnreachable
from crashbus.identity import crash_id, unknown_crash_id
from crashbus.layout import BINARIES, Kind
from crashbus.messages import Module, Process, SignalEvent
from crashbus.names import token
from services.collector import ahead, judge, metrics, processes, spool
from services.collector.judge import RecordState, Verdict
from services.collector.ledger import Crash, Ledger, Source
from services.collector.spool import Entry, Refused
from services.common import crash_directory
from services.common.crash_directory import SpoolUnusable

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_AGAIN = 5.0  # seconds between rounds over directories that may have changed unseen
MAX_SMALL_FILE = 64 * 1024  # read of cfg, info and backtrace to judge a set
MAX_FILES = 512  # of one crash; AppScope writes four for each signal
EVENTS_KEPT = 86400.0  # seconds; older files are not looked up among the events
TAKES_LONG = 0.2  # seconds; most sets are whole by then
WAIT_FOR = 1024  # processes waited for at a time
_PID = re.compile(r"[1-9][0-9]{0,6}")  # at most 4194304, proc_sys_kernel(5), pid_max
_CHANGES = Mask.CREATE | Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.ONLYDIR | Mask.DONT_FOLLOW


@dataclass(frozen=True)
class FoundSet:
    """A set of files of one epoch, as it was seen.

    Attributes:
        record: what the recorder says of it; None for a set that AppScope made.
        writer: the process that made it, if that still lives.
        promised: the kinds that AppScope's configuration announces, if it could be read.
    """

    directory: str
    epoch: int
    entries: dict[Kind, Entry]
    verdict: Verdict
    record: RecordState | None
    writer: Process | None
    promised: Set[Kind] | None
    cause: judge.Cause | None
    comm: str

    @property
    def owners(self) -> set[int]:
        """The UIDs that own its files."""
        return {entry.uid for entry in self.entries.values()}

    def judged(self, writer: Process | None) -> "FoundSet":
        """Return a set of AppScope's, judged in the light of who writes it."""
        open_files = spool.open_by_process(writer.pid) if writer else set()
        verdict = judge.judge_appscope(
            present=self.entries.keys(),
            held_open={k for k, entry in self.entries.items() if entry.identity in open_files},
            promised=self.promised,
            process_alive=writer is not None,
        )
        return replace(self, writer=writer, verdict=verdict)


class Gatherer:
    """Watches the spool.

    Args:
        root: the spool, such as ``/tmp/appscope``.
        on_crash: called with each crash that is new or has new files.
        on_core: called with crash ID, directory and name of a large core that is being written.
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
        on_core: Callable[[str, str, str], None],
        on_ready: Callable[[], None],
    ) -> None:
        self.root = root
        self._host = host
        self._boot_id = boot_id
        self._destinations = destinations
        self._ledger = ledger
        self._bus = bus
        self._on_crash = on_crash
        self._on_core = on_core
        self._on_ready = on_ready
        self._settled: dict[str, int] = {}  # directory to its mtime when nothing was left to do
        self._reported: set[tuple[str, str]] = set()  # what was refused, said once
        self._waiting: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()  # one look at a time: each is short
        self._watched: dict[asyncinotify.Watch, str] = {}
        self._root_watch: asyncinotify.Watch | None = None
        self._root_identity: tuple[int, int] | None = None
        self._changed: set[str] = set()
        self._being_captured: dict[tuple[str, int], str] = {}
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        with Inotify() as inotify:
            await self._watch_root(inotify)
            self._on_ready()
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._notice(inotify), name="notice")
                    tasks.create_task(self._rounds(inotify), name="rounds")
                    tasks.create_task(self._look_at_changed(), name="look")
            finally:
                for task in self._waiting.values():
                    task.cancel()

    async def _watch_root(self, inotify: Inotify) -> None:
        """Watch the spool itself, made ours if it is not; again if it was made anew."""
        identity = await asyncio.to_thread(_make_spool, self.root)
        if identity != self._root_identity:
            self._root_watch = inotify.add_watch(self.root, _CHANGES)
            self._root_identity = identity

    async def _notice(self, inotify: Inotify) -> None:
        """Note which directories change."""
        async for event in inotify:
            if event.watch is None:
                continue
            if Mask.IGNORED in event.mask:
                self._watched.pop(event.watch, None)
                continue
            name = (
                str(event.name)
                if event.watch is self._root_watch
                else self._watched.get(event.watch)
            )
            if name is None or not _PID.fullmatch(name):
                continue
            if event.watch is self._root_watch:
                self._watch(inotify, name)
            self._look_soon(name)

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
            try:
                await self._watch_root(inotify)
                directories = await asyncio.to_thread(self._directories)
            except (OSError, SpoolUnusable) as error:
                log.warning("the spool cannot be looked at", error=str(error))
                directories = []
            for name, changed in directories:
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
        async with self._lock:
            try:
                await self._look(directory)
            except FileNotFoundError:
                self._forget(directory)
            except (BusUnreachable, OSError) as error:
                self._settled.pop(directory, None)
                log.warning("will look again", directory=directory, error=str(error))
                return False
            except Exception:  # one odd directory must not end all gathering
                metrics.FAULTS.labels("gather").inc()
                log.exception("cannot gather from a directory", directory=directory)
        return True

    def _forget(self, directory: str) -> None:
        """Drop what is known of a directory that is gone."""
        for key in [key for key in self._being_captured if key[0] == directory]:
            del self._being_captured[key]

    async def _look(self, directory: str) -> None:
        changed, found = await asyncio.to_thread(self._examine, directory)
        settled = True
        self._settled[directory] = changed  # also when a fault of our own ends this look
        for one in found:
            judged, process = await self._identified(one)
            before = self._being_captured.pop((directory, one.epoch), None)
            if judged.verdict is Verdict.WAIT:
                settled = False
                if judged.record and judged.record.record:
                    self._note_capture(judged, judged.record.record.crash_id, before is None)
                self._look_when_gone(judged)
            else:
                await self._enter(judged, process)
        if not settled:
            self._settled.pop(directory, None)

    def _note_capture(self, found: FoundSet, crash_id: str, is_new: bool) -> None:
        """Keep in mind that a set is being written; have its core sent if that takes long."""
        self._being_captured[found.directory, found.epoch] = crash_id
        core = found.entries.get(Kind.CORE)
        if core is not None and core.uid == 0 and core.size >= ahead.LEAST:
            self._on_core(crash_id, found.directory, core.name)
        elif is_new:
            # No notification tells of the core's size, which it has from the beginning.
            loop = asyncio.get_running_loop()
            loop.call_later(TAKES_LONG, self._look_soon, found.directory)

    def _look_soon(self, directory: str) -> None:
        self._changed.add(directory)
        self._wake.set()

    async def _identified(self, found: FoundSet) -> tuple[FoundSet, Process | None]:
        """Find out who made a set of AppScope's; judge it anew if that process still lives."""
        if found.record is not None or found.writer is not None:
            return found, found.writer
        process = await self._seen_by_detector(found)
        if process is not None and processes.is_alive(process.pid, process.start_ticks):
            found = await asyncio.to_thread(found.judged, process)
        return found, process

    def _look_when_gone(self, found: FoundSet) -> None:
        """Look again when the writer of a set has ended."""
        if found.writer is None:
            return
        writer, directory = found.writer, found.directory
        key = (directory, writer.pid)
        if key in self._waiting or len(self._waiting) >= WAIT_FOR:
            return  # rounds go on all the same

        async def wait() -> None:
            try:
                await processes.gone(writer.pid, writer.start_ticks)
            finally:
                self._waiting.pop(key, None)
            await self.look(directory)

        self._waiting[key] = asyncio.create_task(wait(), name=f"wait for {writer.pid}")

    def _examine(self, directory: str) -> tuple[int, list[FoundSet]]:
        with (
            spool.open_directory(str(self.root)) as root,
            spool.open_directory(directory, root) as descriptor,
        ):
            changed = os.fstat(descriptor).st_mtime_ns
            found = self._sets(directory, descriptor)
            if any(_is_stale(one) for one in found):
                found = self._sets(directory, descriptor)
        return changed, found

    def _sets(self, directory: str, descriptor: int) -> list[FoundSet]:
        listing = spool.list_directory(descriptor)
        for refused in listing.refused:
            self._refuse(directory, refused)
        return [
            self._judge(directory, descriptor, epoch, entries)
            for epoch, entries in listing.sets.items()
            if any(not self._is_entered(directory, e) for e in entries.values())
        ]

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
            return FoundSet(directory, epoch, files, verdict, record, None, None, None, "unknown")
        found = FoundSet(
            directory,
            epoch,
            files,
            Verdict.WAIT,
            None,
            None,
            judge.promised_kinds(_content(descriptor, files.get(Kind.CFG))),
            judge.cause_of(_content(descriptor, files.get(Kind.BACKTRACE))),
            judge.process_name(_content(descriptor, files.get(Kind.INFO))) or "unknown",
        )
        writer = processes.writer_of(int(directory), epoch, found.owners, self._boot_id)
        return found.judged(writer)

    async def _enter(self, found: FoundSet, process: Process | None) -> None:
        """Enter a set in the ledger, under the crash it belongs to.

        Args:
            process: who made it, where that is known and no record says so.
        """
        crash = self._crash_of(found, process)
        sources = [
            _source(found, e)
            for e in found.entries.values()
            if self._belongs(found, e, crash) and not self._is_entered(found.directory, e)
        ]
        if not sources:
            return
        if found.record and found.record.record:
            crash.modules = found.record.record.modules
            sources.extend(await asyncio.to_thread(self._binaries, crash.modules))
        crash.sources.update({source.name: source for source in sources})
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

    def _binaries(self, modules: tuple[Module, ...]) -> list[Source]:
        """Return the binaries of a crash that came with no earlier one."""
        new: dict[str, Source] = {}
        with (
            suppress(FileNotFoundError),
            spool.open_directory(str(self.root)) as root,
            spool.open_directory(BINARIES, root) as directory,
        ):
            for module in modules:
                for file in module.files():
                    known = self._ledger.knows_file(BINARIES, file.name)
                    if not known and spool.is_root_s(file.name, directory):
                        new[file.name] = Source(directory=BINARIES, name=file.name, kind=file.kind)
        return list(new.values())

    def _belongs(self, found: FoundSet, entry: Entry, crash: Crash) -> bool:
        """Tell whether a file is the crash's own; what is not is refused."""
        owner = 0 if found.record is not None else crash.process.uid
        if entry.uid != owner:
            text = f"{entry.name!r} belongs to UID {entry.uid}, not to {owner}"
            self._refuse(found.directory, Refused("foreign_owner", text))
            return False
        if len(crash.sources) >= MAX_FILES:
            text = f"more than {MAX_FILES} files of crash {crash.crash_id}"
            self._refuse(found.directory, Refused("too_many_files", text))
            return False
        return True

    def _crash_of(self, found: FoundSet, process: Process | None) -> Crash:
        record = found.record.record if found.record else None
        crash = None
        if record is not None:
            crash = self._ledger.get(record.crash_id) or self._from_record(record)
            # AppScope's files of the same crash may have been entered first.
            crash.fingerprint = record.fingerprint or crash.fingerprint
        elif process is not None:
            name = crash_id(process.boot_id, process.pid, process.start_ticks)
            crash = self._ledger.get(name) or self._from_files(name, process, found)
        if crash is None or _clashes(crash, found):
            return self._of_unknown(found)
        return crash

    def _of_unknown(self, found: FoundSet) -> Crash:
        """Return the crash of a process that cannot be told: by its files alone."""
        pid, owner = int(found.directory), min(found.owners)
        name = unknown_crash_id(self._boot_id, pid, found.epoch, owner)
        process = processes.unknown(pid, found.epoch, owner, found.comm, self._boot_id)
        crash = self._ledger.get(name) or self._from_files(name, process, found)
        note = "the process was gone before anyone saw it: its start is not known"
        if note not in crash.notes:
            crash.notes.append(note)
        return crash

    def _from_files(self, name: str, process: Process, found: FoundSet) -> Crash:
        cause = found.cause
        return Crash(
            crash_id=name,
            host=self._host,
            crashed_at=float(found.epoch),
            process=process,
            signal=cause.signal if cause else 0,
            signal_name=signals.name(cause.signal) if cause else "unknown",
            code_meaning=cause.meaning if cause else None,
            fault_address=cause.fault_address if cause else None,
            destinations=self._destinations,
        )

    def _from_record(self, record: CaptureRecord) -> Crash:
        return Crash(
            host=self._host,
            destinations=self._destinations,
            notes=list(record.notes),
            **record.model_dump(exclude={"state", "files", "modules", "notes", "host"}),
        )

    async def _seen_by_detector(self, found: FoundSet) -> Process | None:
        """Ask the bus which process took a signal when the set was made."""
        since = found.epoch - processes.EVENT_BEFORE
        if not time.time() - EVENTS_KEPT < since < time.time():
            return None
        events = await self._bus.stored(SignalEvent, f"crash.signal.{token(self._host)}.>", since)
        return processes.from_events(int(found.directory), found.epoch, found.owners, events)


def _clashes(crash: Crash, found: FoundSet) -> bool:
    """Tell whether a crash has files of these names from another directory: a process in a
    container that shares the spool has one by its own PID and one by the host's."""
    return any(
        source.directory != found.directory
        for entry in found.entries.values()
        if (source := crash.sources.get(entry.name)) is not None
    )


def _is_stale(found: FoundSet) -> bool:
    """Tell whether a set was completed between the listing and the reading of its record."""
    record = found.record.record if found.record else None
    if record is None or record.state != "complete":
        return False
    return not set(record.files) <= {entry.name for entry in found.entries.values()}


def _make_spool(root: Path) -> tuple[int, int]:
    """Make the spool, or take it over, and return its device and inode."""
    descriptor = crash_directory.open_spool(root)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return status.st_dev, status.st_ino


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


def _source(found: FoundSet, entry: Entry) -> Source:
    record = found.record.record if found.record else None
    captured = record.files.get(entry.name) if record else None
    source = Source(directory=found.directory, name=entry.name, kind=entry.kind)
    source.note = _note(found, entry, captured)
    if captured is not None:
        source.in_order = captured.in_order
        source.expected = captured.expected
        if captured.size != entry.size and not captured.truncated:
            source.expected = captured.size
    return source


def _note(found: FoundSet, entry: Entry, captured: CapturedFile | None) -> str | None:
    """Return why a file is incomplete; None when it is whole."""
    if captured is not None and captured.truncated:
        return captured.note or "cut short by the recorder"
    if captured is not None and captured.size != entry.size:
        return f"{entry.size} bytes, {captured.size} were written"
    if found.verdict is Verdict.CUT_SHORT and entry.kind in judge.doubtful(found.entries.keys()):
        return "its writer ended before it was whole"
    return None
