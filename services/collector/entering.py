"""Entering sets of crash files in the ledger, each under the crash it belongs to."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from crashbus import layout, signals
from crashbus.identity import crash_id, unknown_crash_id
from crashbus.layout import BINARIES, Kind
from crashbus.parts import Module, Process
from services.collector import metrics, processes, spool
from services.collector.found import FoundSet, sent_sources, source_of
from services.collector.judge import Verdict
from services.collector.ledger import Crash, Ledger, Source
from services.collector.merging import merge
from services.collector.spool import Entry, Refused
from services.common.capture import CaptureRecord

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MAX_FILES = 512  # of one crash; AppScope writes four for each signal
_MOST_REFUSALS = 10_000  # remembered; an attacker's names are not kept for ever


class Entering:
    """Enters what was found.

    Args:
        root: the spool.
        on_crash: called with each crash that is new or has new files.
    """

    def __init__(
        self,
        root: Path,
        host: str,
        boot_id: str,
        destinations: tuple[str, ...],
        ledger: Ledger,
        on_crash: Callable[[Crash], None],
    ) -> None:
        self._root = root
        self._host = host
        self._boot_id = boot_id
        self._destinations = destinations
        self._ledger = ledger
        self._on_crash = on_crash
        self._refused: set[tuple[str, str]] = set()  # said once

    def has_new(self, directory: str, entries: Mapping[Kind, Entry]) -> bool:
        """Tell whether there is something left to do with a set."""
        record = entries.get(Kind.CAPTURE)
        if record is not None and [e for e in entries.values() if e.uid == 0] == [record]:
            # It may name a core that is on the bus and nowhere else.
            core = layout.crash_file_name(Kind.CORE, record.epoch)
            if not self._ledger.knows_file(directory, core, 0):
                return True
        return any(not self._is_entered(directory, entry) for entry in entries.values())

    def _is_entered(self, directory: str, entry: Entry) -> bool:
        return entry.kind is Kind.CAPTURE or self._ledger.knows_file(
            directory, entry.name, entry.uid
        )

    def refuse(self, directory: str, refused: Refused) -> None:
        """Say what is not touched, and why; once."""
        key = (directory, str(refused))
        if key not in self._refused:
            if len(self._refused) > _MOST_REFUSALS:
                self._refused.clear()
            self._refused.add(key)
            metrics.REFUSED.labels(refused.reason).inc()
            log.warning("refused", directory=directory, reason=refused.reason, error=str(refused))

    async def enter(self, found: FoundSet, process: Process | None) -> None:
        """Enter a set in the ledger, under the crash it belongs to.

        Args:
            process: who made it, where that is known and no record says so.
        """
        sent = sent_sources(found)
        if not found.entries and not sent:
            return
        told = self._told_by(found, process)
        crash = self._ledger.get(told.crash_id) or told
        # What is on the bus lies there under the crash's own ID.
        if not sent and _clashes(crash, found):
            told = self._apart(found)
            crash = self._ledger.get(told.crash_id) or told
        sources = [
            source_of(found, e)
            for e in found.entries.values()
            if self._belongs(found, e, crash) and not self._is_entered(found.directory, e)
        ]
        sources += [
            source
            for source in sent
            if not self._ledger.knows_file(found.directory, source.name, 0)
        ]
        if not sources:
            return
        if crash is not told:
            merge(crash, told)
        if told.modules:
            sources.extend(await asyncio.to_thread(self._binaries, told.modules))
        crash.sources.update({source.name: source for source in sources})
        crash.delivered_at = None
        if found.verdict is Verdict.CUT_SHORT:
            metrics.CUT_SHORT.inc()
            note = f"the set of {found.epoch} is cut short: its writer is gone"
            if note not in crash.notes:
                crash.notes.append(note)
        for entry in found.entries.values():
            if entry.others_write and entry.name in crash.sources:
                note = f"{entry.name}: others than its owner may have written to it"
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
            spool.open_directory(str(self._root)) as root,
            spool.open_directory(BINARIES, root) as directory,
        ):
            for module in modules:
                for file in module.files():
                    known = self._ledger.knows_file(BINARIES, file.name, 0)
                    if not known and spool.is_root_s(file.name, directory):
                        new[file.name] = Source(
                            directory=BINARIES, name=file.name, kind=file.kind, owner=0
                        )
        return list(new.values())

    def _belongs(self, found: FoundSet, entry: Entry, crash: Crash) -> bool:
        """Tell whether a file is the crash's own; what is not is refused."""
        if found.record is not None and entry.uid != 0:
            text = f"{entry.name!r} belongs to UID {entry.uid}, not to root"
            self.refuse(found.directory, Refused("foreign_owner", text))
            return False
        if entry.others_write and found.record is not None:
            text = f"{entry.name!r} is not the recorder's: others may write to it"
            self.refuse(found.directory, Refused("others_may_write", text))
            return False
        if len(crash.sources) >= MAX_FILES:
            text = f"more than {MAX_FILES} files of crash {crash.crash_id}"
            self.refuse(found.directory, Refused("too_many_files", text))
            return False
        return True

    def _told_by(self, found: FoundSet, process: Process | None) -> Crash:
        """Return the crash as this set alone tells it."""
        if found.record and found.record.record:
            return self._from_record(found.record.record)
        if process is not None:
            name = crash_id(process.boot_id, process.pid, process.start_ticks)
            return self._from_files(name, process, found)
        return self._of_unknown(found)

    def _apart(self, found: FoundSet) -> Crash:
        """Return a crash for a set that has the names of another's files of the same process."""
        if not (found.record and found.record.record):
            return self._of_unknown(found)
        told = self._from_record(found.record.record)
        note = f"another set of crash {told.crash_id} has files of the same names"
        update = {"crash_id": self._unknown_id(found), "notes": [*told.notes, note]}
        return told.model_copy(update=update)

    def _unknown_id(self, found: FoundSet) -> str:
        return unknown_crash_id(self._boot_id, int(found.directory), found.epoch, found.owner)

    def _of_unknown(self, found: FoundSet) -> Crash:
        """Return the crash of a process that cannot be told: by its files alone."""
        pid, owner = int(found.directory), found.owner
        process = processes.unknown(pid, found.epoch, owner, found.comm, self._boot_id)
        crash = self._from_files(self._unknown_id(found), process, found)
        crash.notes.append("the process was gone before anyone saw it: its start is not known")
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
            signal_at=float(found.epoch),
            code_meaning=cause.meaning if cause else None,
            fault_address=cause.fault_address if cause else None,
            destinations=self._destinations,
        )

    def _from_record(self, record: CaptureRecord) -> Crash:
        return Crash(
            host=self._host,
            destinations=self._destinations,
            notes=list(record.notes),
            signal_at=record.crashed_at,
            signal_recorded=record.signal > 0,
            **record.model_dump(exclude={"state", "files", "notes", "host"}),
        )


def _clashes(crash: Crash, found: FoundSet) -> bool:
    """Tell whether a crash has other files of these names: from another directory, for a process
    in a container that shares the spool has one by its own PID and one by the host's, or such as
    its user made before the recorder came."""
    return any(
        source.directory != found.directory or source.owner not in (found.owner, None)
        for entry in found.entries.values()
        if entry.uid == found.owner and (source := crash.sources.get(entry.name)) is not None
    )
