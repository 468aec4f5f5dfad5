"""Gathering: finds sets of crash files in the spool and enters them in the ledger.

A directory is looked at whenever something in it changes (inotify), when a process that was
waited for ends, and from time to time, because notifications can be lost; inotify(7).
"""

import asyncio
import math
import os
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Set
from contextlib import aclosing
from functools import cache
from heapq import heappush, heappushpop
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
from services.collector.lanes import Lane
from services.collector.watching import Watches
from services.common import crash_directory
from services.common.crash_directory import SpoolUnusable
from services.common.drafts import Awaited

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_AGAIN = 5.0  # seconds between rounds over directories that may have changed unseen
EVENTS_KEPT = 86400.0  # seconds; older files are not looked up among the events
MOST_EVENTS = 10_000  # read for one directory; others wait for their turn
MOST_SPANS = 16  # of time in which its sets are looked up, the newest
EVENTS_LATE = 5.0  # seconds; the detector sends them nearly in their order
TAKES_LONG = 0.2  # seconds; most sets are whole by then
WAIT_FOR = 1024  # processes waited for at a time
MOST_CHANGED = 65_536  # directories that wait for a look; rounds find what is beyond that
MOST_STRANGE = 64  # directories of one owner that wait until the bus is asked; likewise
MOST_STRANGE_IN_ALL = 1024
MOST_OF_OTHERS = 65_536  # directories that are not root's in a round
_PID = re.compile(r"[1-9][0-9]{0,6}")
_NO_PID = 4194304  # one more than the highest, proc_sys_kernel(5), pid_max
# A directory that was renamed keeps its watch, inotify(7); another may get its former name.
_CHANGES = Mask.CREATE | Mask.MOVED_TO | Mask.MOVED_FROM | Mask.ONLYDIR | Mask.DONT_FOLLOW


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
        self._awaited = Awaited(root, patience)
        self._settled: dict[str, int] = {}  # directory to its ctime when nothing was left to do
        self._waiting: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()  # one look at a time: each is short
        self._watches = Watches(root)
        self._root_watch: asyncinotify.Watch | None = None
        self._root_identity: tuple[int, int] | None = None
        self._ours = Lane(MOST_CHANGED)  # root's, which no number of others' holds up
        self._changed = Lane(MOST_CHANGED)
        self._strange = Lane()  # of whose sets only the bus can tell who made them
        self._strangers: dict[str, int] = {}  # who made them there, in those that wait
        self._asked_since: dict[str, float] = {}  # of a directory's sets, in its last look
        self._being_captured: dict[tuple[str, int], str] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        with Inotify() as inotify:
            await self._watch_root(inotify)
            self._on_ready()
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._notice(inotify), name="notice")
                    tasks.create_task(self._rounds(inotify), name="rounds")
                    tasks.create_task(self._ours.work(self._glance), name="look at root's")
                    tasks.create_task(self._changed.work(self._glance), name="look")
                    tasks.create_task(self._strange.work(self._look_at_strange), name="identify")
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
                self._watches.ended(event.watch)
                continue
            name = (
                str(event.name)
                if event.watch is self._root_watch
                else self._watches.name_of(event.watch)
            )
            if name is None or not _is_pid(name):
                continue
            if Mask.MOVED_FROM in event.mask:
                self._watches.renamed(name)
                continue
            is_ours = _is_root_s(self.root / name)
            if is_ours or event.watch is self._root_watch:
                self._watches.add(inotify, name, is_root_s=is_ours, is_new=True)
            (self._ours if is_ours else self._changed).put(name)

    async def _rounds(self, inotify: Inotify) -> None:
        while True:
            try:
                await self._watch_root(inotify)
                ours, others = await asyncio.to_thread(self._directories)
            except (OSError, SpoolUnusable) as error:
                log.warning("the spool cannot be looked at", error=str(error))
                ours, others = {}, {}
            else:
                known = ours.keys() | others.keys()
                self._settled = {n: t for n, t in self._settled.items() if n in known}
                self._asked_since = {n: t for n, t in self._asked_since.items() if n in known}
            for name, changed in (*ours.items(), *others.items()):
                if self._settled.get(name) != changed:
                    self._watches.add(inotify, name, is_root_s=name in ours, is_new=False)
                    await self._glance(name)
            await asyncio.sleep(LOOK_AGAIN)

    def _directories(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return when each ``<pid>`` directory changed, by name.

        All that are root's, as the recorder's are; of those that others made the newest.
        """
        ours: dict[str, int] = {}
        others: list[tuple[int, str]] = []  # a heap
        with os.scandir(self.root) as entries:
            for entry in entries:
                if not _is_pid(entry.name) or not entry.is_dir(follow_symlinks=False):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                found = status.st_ctime_ns, entry.name  # its owner can set the other times
                if status.st_uid == 0:
                    ours[entry.name] = status.st_ctime_ns
                elif len(others) < MOST_OF_OTHERS:
                    heappush(others, found)
                else:
                    heappushpop(others, found)
        return ours, {name: changed for changed, name in others}

    def is_being_captured(self, crash_id: str) -> bool:
        """Tell whether the recorder was still writing a crash's files at the last look."""
        return crash_id in self._being_captured.values()

    async def look(self, directory: str) -> bool:
        """Look at one ``<pid>`` directory and enter what is whole there.

        Returns:
            False after a fault of the bus or of the disk, which leaves it for the next round.
        """
        return await self._look(directory, self._identify)

    async def _glance(self, directory: str) -> None:
        """Look at one, and leave for later what only the bus can tell of."""
        await self._look(directory, self._identify_later)

    async def _look(
        self, directory: str, identify: Callable[[str, list[FoundSet]], Awaitable[None]]
    ) -> bool:
        try:
            async with self._lock:
                unknown = await self._enter_known(directory)
            if unknown:
                await identify(directory, unknown)
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

    async def _enter_known(self, directory: str) -> list[FoundSet]:
        """Enter what can be told without the bus, which may be away or slow; return the rest."""
        changed, found = await asyncio.to_thread(self._examine, directory)
        self._settled[directory] = changed  # also when a fault of our own ends this look
        self._forget(directory, but={one.epoch for one in found})
        known = [one for one in found if not _is_of_unknown(one)]
        if not all([await self._take(one, one.writer) for one in known]):
            self._settled.pop(directory, None)
        return [one for one in found if _is_of_unknown(one)]

    async def _identify_later(self, directory: str, unknown: list[FoundSet]) -> None:
        waiting = Counter(self._strangers.values())
        owner = min((one.owner for one in unknown), key=waiting.__getitem__)
        is_full = waiting[owner] >= MOST_STRANGE or len(self._strangers) >= MOST_STRANGE_IN_ALL
        if is_full and directory not in self._strangers:
            self._settled.pop(directory, None)
        else:
            self._strangers.setdefault(directory, owner)
            self._strange.put(directory)

    async def _look_at_strange(self, directory: str) -> None:
        self._strangers.pop(directory, None)
        await self.look(directory)

    async def _identify(self, directory: str, unknown: list[FoundSet]) -> None:
        """Enter sets of unknown writers, under the processes that the bus tells."""
        recent = [one for one in unknown if _is_recent(one)]
        before = self._asked_since.pop(directory, math.inf)
        asked = [one for one in recent if one.epoch < before] or recent
        events, since = await self._events_of(int(directory), asked)
        told = [one for one in unknown if not _is_recent(one)]
        told += [one for one in asked if one.epoch >= since]
        if len(told) < len(unknown):  # their turn comes in a later round
            self._settled.pop(directory, None)
            self._asked_since[directory] = since
        open_files = cache(spool.open_by_process)
        async with self._lock:
            taken = [
                await self._take(*await self._identified(one, events, open_files)) for one in told
            ]
        if not all(taken):
            self._settled.pop(directory, None)

    async def _take(self, found: FoundSet, process: Process | None) -> bool:
        """Enter a set, unless its writer is not done with it; tell whether it is entered.

        Args:
            process: who made it, where that is known and no record says so.
        """
        key = found.directory, found.epoch
        before = self._being_captured.pop(key, None) if found.record else None
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
            loop.call_later(TAKES_LONG, self._ours.put, found.directory)

    async def _events_of(self, pid: int, recent: list[FoundSet]) -> tuple[list[SignalEvent], float]:
        """Ask the bus which processes took signals when sets of unknown writers were made.

        Once for those that lie close together: anybody can write thousands, and give them any
        time. So what is read is bounded, too.

        Args:
            pid: that these processes have in their own namespace.

        Returns:
            Their events, and since when all were read: what is older has to be asked for again.
        """
        spans = processes.event_times(one.epoch for one in recent)
        subject = f"crash.signal.{token(self._host)}.>"
        events: list[SignalEvent] = []
        left, whole_since = MOST_EVENTS, math.inf
        for since, until in spans[:MOST_SPANS]:
            async with aclosing(self._bus.each_stored(SignalEvent, subject, since)) as stored:
                async for event in stored:
                    left -= 1
                    if event.time > until + EVENTS_LATE or left <= 0:
                        break
                    if event.process.ns_pid == pid:
                        events.append(event)
            # Of so many in its own time that these are not all, more would never be read.
            if left > 0 or math.isinf(whole_since):
                whole_since = since
            if left <= 0:
                break
        return sorted(events, key=lambda event: event.time), whole_since

    async def _identified(
        self,
        found: FoundSet,
        events: list[SignalEvent],
        open_files: Callable[[int], Set[tuple[int, int]]],
    ) -> tuple[FoundSet, Process | None]:
        """Find out who made a set of an unknown; judge it anew if that process still lives.

        Args:
            open_files: tells what a process has open, by device and inode.
        """
        process = processes.from_events(int(found.directory), found.epoch, found.owner, events)
        if process is not None and processes.is_alive(process.pid, process.start_ticks):
            held = await asyncio.to_thread(open_files, process.pid)
            found = found.judged(process, held)
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
            await self._glance(directory)

        self._waiting[key] = asyncio.create_task(wait(), name=f"wait for {writer.pid}")

    def _examine(self, directory: str) -> tuple[int, list[FoundSet]]:
        with (
            spool.open_directory(str(self.root)) as root,
            spool.open_directory(directory, root) as descriptor,
        ):
            changed = os.fstat(descriptor).st_ctime_ns
            found = self._sets(directory, descriptor)
            if any(is_stale(one) for one in found):
                found = self._sets(directory, descriptor)
        return changed, found

    def _sets(self, directory: str, descriptor: int) -> list[FoundSet]:
        listing = spool.list_directory(descriptor)
        living = processes.Living(int(directory), self._boot_id)
        for refused in listing.refused:
            self._entering.refuse(directory, refused)
        return [
            found
            for epoch, entries in listing.sets.items()
            if self._entering.has_new(directory, entries)
            for found in look_at(directory, descriptor, epoch, entries, living, self._awaited)
        ]


def _is_pid(name: str) -> bool:
    return _PID.fullmatch(name) is not None and int(name) < _NO_PID


def _is_recent(found: FoundSet) -> bool:
    """Tell whether there may be events of a set's time."""
    now = time.time()
    return now - EVENTS_KEPT < found.epoch <= now


def _is_root_s(directory: Path) -> bool:
    try:
        return directory.lstat().st_uid == 0
    except OSError:  # it is gone
        return False


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
