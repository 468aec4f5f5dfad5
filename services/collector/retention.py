"""Retention: removes crash files from this host, once they are delivered or for want of room."""

import asyncio
import errno
import os
import random
import time
from contextlib import suppress
from itertools import groupby
from operator import itemgetter

import structlog

from crashbus import layout
from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable, NotPermitted
from crashbus.layout import LARGE, Kind
from services.collector import metrics, room, spool
from services.collector.core_streams import CoreStreams
from services.collector.delivery import Deliverer
from services.collector.ledger import Crash, Ledger, Place, Source
from services.collector.plan import waiting
from services.collector.room import Candidate, Loss
from services.collector.settings import CollectorSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SWEEP_EVERY = 5.0  # seconds
STRAY_AFTER = 86400.0  # seconds; a crash that is being captured has none so old
ANEW_WITHIN = 60.0  # seconds for a damaged core to be published anew before it may be dropped
UNREAD_FOR = 600.0  # seconds in which what may not be read back is not tried again
SILENT_FOR = 60.0  # seconds, where the bus did not answer
_BLOCK = 512  # bytes of a block in st_blocks, stat(2)


Usage = dict[Place, int]  # bytes that each file takes


class Retention:
    """Sweeps the spool from time to time."""

    def __init__(
        self,
        root: str,
        ledger: Ledger,
        bus: Bus,
        deliverer: Deliverer,
        cores: CoreStreams,
        settings: CollectorSettings,
    ) -> None:
        self._root = root
        self._ledger = ledger
        self._bus = bus
        self._deliverer = deliverer
        self._cores = cores
        self._settings = settings
        # Files, by crash and name, each until some time on the monotonic clock: those whose chunks
        # on the bus were not what had been sent, and those whose chunks could not be read back.
        self._damaged: dict[tuple[str, str], float] = {}
        self._unread: dict[tuple[str, str], float] = {}
        self._no_reading_until = 0.0

    async def run(self) -> None:
        """Remove what may go, until cancelled."""
        while True:
            is_judged = True
            try:
                for crash in self._ledger.expired(self._settings.keep_delivered):
                    await self._remove_crash(crash)
                is_judged = await self._make_room()
                await asyncio.to_thread(remove_strays, self._root, self._ledger)
            except (OSError, BusUnreachable, BusFull) as error:
                log.warning("files stay for now", error=str(error))
            if not is_judged:
                continue
            # Out of step with the rechecks, during which no file may be removed.
            every = min(SWEEP_EVERY, self._settings.recheck)
            await asyncio.sleep(every * random.uniform(0.7, 1.3))  # noqa: S311 - no secret

    async def _remove_crash(self, crash: Crash) -> None:
        if self._cores.has(crash.crash_id):  # a core of it comes, and is nowhere else
            return
        await remove_crash(self._root, self._ledger, crash)
        if self._ledger.get(crash.crash_id) is None and not self._cores.has(crash.crash_id):
            # A copy of a chunk can have come after its file was delivered, and a nats-server
            # 2.9 that is killed has items back that were acknowledged, for nobody. Now none would
            # ever take them off the bus. Room is made without a bus, too.
            with suppress(BusUnreachable):
                await self._bus.purge_crash(crash.crash_id)

    async def _make_room(self) -> bool:
        """Remove what has no room; False: there may be more, which is to be judged anew."""
        settings, crashes = self._settings, self._ledger.crashes()
        self._damaged, self._unread = _not_over(self._damaged), _not_over(self._unread)
        has_limit = settings.spool_bytes or settings.keep_delivered_bytes
        if not has_limit and not await asyncio.to_thread(self._excess_on_disk):
            return True
        files = [source.place for crash in crashes for source in crash.sources.values()]
        usage = await asyncio.to_thread(measure, self._root, files)
        delivered = [_whole(c, usage) for c in crashes if c.delivered_at is not None]
        kept = sum(one.size for one in delivered)
        for one in room.to_remove(delivered, room.excess(kept, settings.keep_delivered_bytes)):
            await self._remove(one)
        excess = max(
            room.excess(sum(usage.values()), settings.spool_bytes),
            await asyncio.to_thread(self._excess_on_disk),
        )
        if excess:
            found = [one for one in delivered if self._ledger.get(one.crash_id)]
            for crash in crashes:
                found += await self._candidates(crash, usage)
            stays = self._not_instead(crashes)
            found = [one for one in found if one.loss not in stays]
            for one in room.to_remove(found, excess):
                if not await self._remove(one):
                    return False
        return True

    def _excess_on_disk(self) -> int:
        disk = os.statvfs(self._root)
        size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
        return room.excess_on_disk(size, free, self._settings.disk_reserve)

    def _not_instead(self, crashes: list[Crash]) -> set[Loss]:
        """Return what a core that cannot go just now shall not cost."""
        if self._unread:  # an outage passes, and then nothing need be lost
            return {Loss.LARGE, Loss.SMALL}
        is_hidden = self._damaged or time.monotonic() < self._no_reading_until
        if is_hidden or any(self._has_large_in_hand(crash) for crash in crashes):
            return {Loss.SMALL}
        return set()

    def _has_large_in_hand(self, crash: Crash) -> bool:
        large = (source for source in crash.sources.values() if source.kind in LARGE)
        return any(self._deliverer.offering.is_sending(crash, source) for source in large)

    async def _candidates(self, crash: Crash, usage: Usage) -> list[Candidate]:
        """Return the files of a crash that wait, and have waited long enough."""
        if crash.delivered_at is not None:
            return []
        if time.time() - max(crash.crashed_at, crash.reported_at) < self._settings.drop_after:
            return []
        found = []
        for source in crash.sources.values():
            size = usage.get(source.place, 0)
            # What is lost already and still there could not be removed; it is told only once.
            if size and not source.lost and not self._deliverer.offering.is_sending(crash, source):
                loss = await self._loss(crash, source)
                if loss is not None:
                    found.append(_candidate(crash, crash.crashed_at, source.name, size, loss))
        return found

    async def _loss(self, crash: Crash, source: Source) -> Loss | None:
        """Return what is lost with a file; None: it may not go just now."""
        key = crash.crash_id, source.name
        if not _is_needed(crash, source):
            return Loss.NOTHING
        if source.kind not in LARGE:
            return Loss.SMALL
        if await self._deliverer.offering.is_on_bus(crash, source):
            self._damaged.pop(key, None)
            is_unread = key in self._unread or time.monotonic() < self._no_reading_until
            return None if is_unread and not source.removed else Loss.COPY
        if key in self._damaged and waiting(crash, source):
            return None  # it is published anew just now
        return Loss.LARGE

    async def _remove(self, one: Candidate) -> bool:
        """Remove what may go; tell whether what was judged with it still is as it was."""
        crash = self._ledger.get(one.crash_id)
        if crash is None:
            return True
        if not one.name:
            await self._remove_crash(crash)
            return True
        source = crash.sources[one.name]
        if one.loss is Loss.COPY:
            return await self._remove_copy(crash, source)
        if one.loss is not Loss.NOTHING:
            # To drop those before it took its time, too.
            offering = self._deliverer.offering
            if one.loss is Loss.LARGE and await offering.is_on_bus(crash, source):
                return True
            if offering.is_sending(crash, source) or not _is_needed(crash, source):
                return True
            await self._deliverer.drop(crash, source)
            metrics.DROPPED.labels(one.loss.name.lower()).inc()
        await self._unlink(source)
        return True

    async def _remove_copy(self, crash: Crash, source: Source) -> bool:
        """Remove a file that the bus has; tell whether that was quick."""
        was_told = source.removed  # and then the collector was killed, or it could not be removed
        if not was_told:
            if not await self._is_on_bus_as_sent(crash, source):
                return False
            metrics.DROPPED.labels("copy").inc()
        await self._give_up_copy(crash, source)
        await self._unlink(source)
        return was_told or self._bus.is_encrypted

    async def _is_on_bus_as_sent(self, crash: Crash, source: Source) -> bool:
        """Tell whether the bus has the file itself; if not, its copy is let alone for a while.

        To read it back may take minutes, in which all else may change.
        """
        key = crash.crash_id, source.name
        try:
            if await self._deliverer.offering.is_whole_on_bus(crash, source):
                return True
        except BusUnreachable as error:
            if not self._bus.is_connected:
                raise
            if isinstance(error, NotPermitted):
                self._no_reading_until = time.monotonic() + UNREAD_FOR
            else:
                self._unread[key] = time.monotonic() + SILENT_FOR
            log.warning(
                "copies stay, for they cannot be read back from the bus",
                crash_id=crash.crash_id,
                file=source.name,
                error=str(error),
                mend="speak TLS with the server itself, tls:// in CRASHBUS_NATS_URL: nothing "
                "is read back then",
            )
        else:
            if waiting(crash, source):
                self._damaged[key] = time.monotonic() + ANEW_WITHIN
                self._deliverer.start(crash)
        return False

    async def _give_up_copy(self, crash: Crash, source: Source) -> None:
        """Note, for all to see, that the bus alone has a file; the caller removes the copy."""
        if source.removed:
            await self._ledger.save(crash)  # it may be that which failed
            return
        source.removed = True
        crash.notes.append(
            f"{source.name} was removed from its host for want of room while it waited on the bus: "
            "a bus that loses its store loses it"
        )
        crash.reported = None  # tell it
        await self._ledger.save(crash)
        self._deliverer.start(crash)
        log.warning(
            "copy removed for room, the file is on the bus alone",
            crash_id=crash.crash_id,
            file=source.name,
            mend="see why a destination takes nothing, or give the spool more room",
        )

    async def _unlink(self, source: Source) -> None:
        try:
            await asyncio.to_thread(_unlink, self._root, source)
        except OSError as error:  # the others may go
            log.warning("a file stays for now", file=source.name, error=str(error))


def _is_needed(crash: Crash, source: Source) -> bool:
    """Tell whether a file may still have to be delivered; what failed can be asked for again."""
    return bool(waiting(crash, source) or source.failed)


def _not_over(until: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    now = time.monotonic()
    return {key: end for key, end in until.items() if now < end}


def _whole(crash: Crash, usage: Usage) -> Candidate:
    size = sum(usage.get(one.place, 0) for one in crash.sources.values())
    return _candidate(crash, crash.delivered_at or 0.0, "", size, Loss.NOTHING)


def _candidate(crash: Crash, since: float, name: str, size: int, loss: Loss) -> Candidate:
    executable = crash.process.executable or crash.process.comm
    return Candidate(crash.crash_id, name, executable, since, size, loss)


def measure(root: str, files: list[Place]) -> Usage:
    """Look at crash files; one that is gone, or is another's now, takes nothing."""
    sizes: Usage = {}
    with spool.open_directory(root) as parent:
        for directory, group in groupby(sorted(set(files), key=itemgetter(0)), key=itemgetter(0)):
            with suppress(OSError), spool.open_directory(directory, parent) as descriptor:
                for file in group:
                    with suppress(FileNotFoundError):
                        status = os.stat(file[1], dir_fd=descriptor, follow_symlinks=False)
                        if file[2] in (status.st_uid, None):
                            sizes[file] = status.st_blocks * _BLOCK
    return sizes


def _unlink(root: str, source: Source) -> None:
    with (
        suppress(FileNotFoundError),
        spool.open_directory(root) as parent,
        spool.open_directory(source.directory, parent) as directory,
    ):
        _unlink_in(directory, source.name, source.owner)


async def remove_crash(root: str, ledger: Ledger, crash: Crash) -> None:
    """Remove a delivered crash with its files."""
    # A further set may have been entered since the sweep began, or while files are removed.
    if crash.delivered_at is None:
        return
    files = [source.place for source in crash.sources.values()]
    try:
        await asyncio.to_thread(_remove, root, files)
    except OSError as error:
        log.warning("files stay", crash_id=crash.crash_id, error=str(error))
        return
    if crash.delivered_at is not None and len(crash.sources) == len(files):
        await ledger.forget(crash)
        log.info("removed", crash_id=crash.crash_id, files=len(files))


def remove_strays(root: str, ledger: Ledger) -> None:
    """Remove binaries that belong to no crash: their recorder was killed, or their record."""
    with (
        suppress(FileNotFoundError),
        spool.open_directory(root) as parent,
        spool.open_directory(layout.BINARIES, parent) as directory,
        os.scandir(directory) as entries,
    ):
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            is_old = time.time() - status.st_mtime > STRAY_AFTER
            if (
                status.st_uid == 0
                and is_old
                and not ledger.knows_file(layout.BINARIES, entry.name, 0)
            ):
                os.unlink(entry.name, dir_fd=directory)
                log.info("removed a binary of no crash", name=entry.name)


def _remove(root: str, files: list[Place]) -> None:
    with spool.open_directory(root) as parent:
        for name in {file[0] for file in files}:
            try:
                with spool.open_directory(name, parent) as directory:
                    _remove_files(directory, [file for file in files if file[0] == name])
                os.rmdir(name, dir_fd=parent)
            except FileNotFoundError:
                continue  # somebody was faster
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # files of another crash may be in it
                    raise


def _remove_files(directory: int, files: list[Place]) -> None:
    for _, name, owner in files:
        parsed = layout.parse_crash_file_name(name)  # None for a binary
        record = [layout.crash_file_name(Kind.CAPTURE, parsed[1])] if parsed else []
        for file in (name, *record):
            _unlink_in(directory, file, owner)


def _unlink_in(directory: int, name: str, owner: int | None) -> None:
    """Remove a file, unless another's has its name now: the recorder puts what stands in the place
    of its files aside."""
    with suppress(FileNotFoundError):
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if owner in (status.st_uid, None):
            os.unlink(name, dir_fd=directory)
