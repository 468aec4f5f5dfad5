"""Gathering: finds sets of crash files in the spool and enters them in the ledger.

A directory is looked at whenever something in it changes (inotify), when a process that was
waited for ends, and from time to time, because notifications can be lost; inotify(7).
"""

import asyncio
import os
import re
import time
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path

import asyncinotify
import structlog
from asyncinotify import Inotify, Mask

from crashbus.bus import Bus
from crashbus.errors import BusUnreachable
from crashbus.layout import Kind
from crashbus.messages import SignalEvent
from crashbus.names import token
from crashbus.parts import Process
from services.collector import ahead, metrics, processes, spool
from services.collector.entering import Entering
from services.collector.found import FoundSet, is_stale, look_at
from services.collector.judge import Verdict
from services.common import crash_directory, drafts
from services.common.crash_directory import SpoolUnusable

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_AGAIN = 5.0  # seconds between rounds over directories that may have changed unseen
EVENTS_KEPT = 86400.0  # seconds; older files are not looked up among the events
TAKES_LONG = 0.2  # seconds; most sets are whole by then
WAIT_FOR = 1024  # processes waited for at a time
_PID = re.compile(r"[1-9][0-9]{0,6}")  # at most 4194304, proc_sys_kernel(5), pid_max
_CHANGES = Mask.CREATE | Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.ONLYDIR | Mask.DONT_FOLLOW
# A directory that was renamed keeps its watch, inotify(7); another may get its former name.
_ROOT_CHANGES = _CHANGES | Mask.MOVED_FROM


class Gatherer:
    """Watches the spool.

    Args:
        root: the spool, such as ``/tmp/appscope``.
        entering: enters what is whole.
        on_core: called with crash ID, directory and name of a large core that is being written.
        on_ready: called once nothing new can be overlooked.
        patience: seconds to wait for a recorder that finishes what a killed one had in hand.
    """

    def __init__(
        self,
        root: Path,
        host: str,
        boot_id: str,
        entering: Entering,
        bus: Bus,
        on_core: Callable[[str, str, str], None],
        on_ready: Callable[[], None],
        patience: float,
    ) -> None:
        self.root = root
        self._host = host
        self._boot_id = boot_id
        self._entering = entering
        self._bus = bus
        self._on_core = on_core
        self._on_ready = on_ready
        self._is_awaited = partial(drafts.is_awaited, root, patience)
        self._settled: dict[str, int] = {}  # directory to its mtime when nothing was left to do
        self._waiting: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()  # one look at a time: each is short
        self._watched: dict[asyncinotify.Watch, str] = {}
        self._watched_names: set[str] = set()  # the same, for anybody can make a great many
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
            self._root_watch = inotify.add_watch(self.root, _ROOT_CHANGES)
            self._root_identity = identity

    async def _notice(self, inotify: Inotify) -> None:
        """Note which directories change."""
        async for event in inotify:
            if event.watch is None:
                continue
            if Mask.IGNORED in event.mask:
                self._watched_names.discard(self._watched.pop(event.watch, ""))
                continue
            name = (
                str(event.name)
                if event.watch is self._root_watch
                else self._watched.get(event.watch)
            )
            if name is None or not _PID.fullmatch(name):
                continue
            if Mask.MOVED_FROM in event.mask:
                self._watched_names.discard(name)
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
        if name in self._watched_names:
            return
        try:
            self._watched[inotify.add_watch(self.root / name, _CHANGES)] = name
        except OSError as error:  # gone again, no directory, or no watches left: rounds go on
            log.debug("directory is not watched", directory=name, error=str(error))
        else:
            self._watched_names.add(name)

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

    def _forget(self, directory: str, but: Set[int] = frozenset()) -> None:
        """Drop what is known of sets that are gone: all of a directory but those of some epochs."""
        for key in [key for key in self._being_captured if key[0] == directory]:
            if key[1] not in but:
                del self._being_captured[key]

    async def _look(self, directory: str) -> None:
        changed, found = await asyncio.to_thread(self._examine, directory)
        self._settled[directory] = changed  # also when a fault of our own ends this look
        self._forget(directory, but={one.epoch for one in found})
        # First what can be told without the bus, which may be away.
        unknown = [one for one in found if _is_of_unknown(one)]
        settled = [await self._take(one, one.writer) for one in found if not _is_of_unknown(one)]
        events = await self._events_of(int(directory), unknown)
        settled += [await self._take(*await self._identified(one, events)) for one in unknown]
        if not all(settled):
            self._settled.pop(directory, None)

    async def _take(self, found: FoundSet, process: Process | None) -> bool:
        """Enter a set, unless its writer is not done with it; tell whether it is entered.

        Args:
            process: who made it, where that is known and no record says so.
        """
        before = self._being_captured.pop((found.directory, found.epoch), None)
        if found.verdict is not Verdict.WAIT:
            await self._entering.enter(found, process)
            return True
        if found.record and found.record.record:
            self._note_capture(found, found.record.record.crash_id, before is None)
        self._look_when_gone(found)
        return False

    def _note_capture(self, found: FoundSet, crash_id: str, is_new: bool) -> None:
        """Keep in mind that a set is being written; have its core sent if that takes long."""
        self._being_captured[found.directory, found.epoch] = crash_id
        core = found.entries.get(Kind.CORE)
        if found.record is None or not found.record.being_written:
            return
        if core is not None and core.uid == 0 and core.size >= ahead.LEAST:
            self._on_core(crash_id, found.directory, core.name)
        elif is_new:
            # No notification tells of the core's size, which it has from the beginning.
            loop = asyncio.get_running_loop()
            loop.call_later(TAKES_LONG, self._look_soon, found.directory)

    def _look_soon(self, directory: str) -> None:
        self._changed.add(directory)
        self._wake.set()

    async def _events_of(self, pid: int, unknown: list[FoundSet]) -> list[SignalEvent]:
        """Ask the bus which processes took signals when sets of unknown writers were made.

        Once for all of them: anybody can write thousands, each of another time.

        Args:
            pid: that these processes have in their own namespace.
        """
        now = time.time()
        times = [one.epoch - processes.EVENT_BEFORE for one in unknown]
        recent = [since for since in times if now - EVENTS_KEPT < since < now]
        if not recent:
            return []
        subject = f"crash.signal.{token(self._host)}.>"
        events = await self._bus.stored(SignalEvent, subject, min(recent))
        return [event for event in events if event.process.ns_pid == pid]

    async def _identified(
        self, found: FoundSet, events: list[SignalEvent]
    ) -> tuple[FoundSet, Process | None]:
        """Find out who made a set of an unknown; judge it anew if that process still lives."""
        process = processes.from_events(int(found.directory), found.epoch, found.owner, events)
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
            if any(is_stale(one) for one in found):
                found = self._sets(directory, descriptor)
        return changed, found

    def _sets(self, directory: str, descriptor: int) -> list[FoundSet]:
        listing = spool.list_directory(descriptor)
        for refused in listing.refused:
            self._entering.refuse(directory, refused)
        return [
            found
            for epoch, entries in listing.sets.items()
            if self._entering.has_new(directory, entries)
            for found in look_at(
                directory, descriptor, epoch, entries, self._boot_id, self._is_awaited
            )
        ]


def _is_of_unknown(found: FoundSet) -> bool:
    return found.record is None and found.writer is None


def _make_spool(root: Path) -> tuple[int, int]:
    """Make the spool, or take it over, and return its device and inode."""
    descriptor = crash_directory.open_spool(root)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return status.st_dev, status.st_ino
