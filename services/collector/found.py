"""A set of crash files as it was seen: which files, what its record says, who writes it."""

import os
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import partial

from crashbus import layout
from crashbus.layout import Kind
from crashbus.parts import Process
from services.collector import judge, spool
from services.collector.judge import RecordState, Verdict
from services.collector.ledger import Source
from services.collector.processes import Living
from services.collector.spool import Entry, Refused
from services.common import capture
from services.common.capture import CapturedFile, UnreadableRecord
from services.common.drafts import Awaited

MAX_SMALL_FILE = 64 * 1024  # read of cfg, info and backtrace to judge a set


@dataclass(frozen=True)
class FoundSet:
    """A set of files of one epoch, as it was seen; without a record all are one owner's.

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
    def owner(self) -> int:
        """The UID that its files belong to: root, where there is a record."""
        return 0 if self.record else next(iter(self.entries.values())).uid

    def judged(
        self, writer: Process | None, open_files: Set[tuple[int, int]] = frozenset()
    ) -> "FoundSet":
        """Return a set of AppScope's, judged in the light of who writes it.

        Args:
            open_files: that the writer has open, by device and inode.
        """
        verdict = judge.judge_appscope(
            present=self.entries.keys(),
            held_open={k for k, entry in self.entries.items() if entry.identity in open_files},
            promised=self.promised,
            process_alive=writer is not None,
        )
        return replace(self, writer=writer, verdict=verdict)


def look_at(
    directory: str,
    descriptor: int,
    epoch: int,
    entries: dict[Kind, Entry],
    living: Living,
    awaited: Awaited,
) -> list[FoundSet]:
    """Read what tells of a set whether it is whole; without a record it is one for each owner.

    Anybody can put files of his own beside another's.

    Args:
        directory: its name below the spool; `descriptor` is of it.
        entries: all its files, its record among them.
        living: who has the PID that the directory is named after.
        awaited: tells of a set whose recorder is gone whether another will finish it.
    """
    record = _record(descriptor, entries.get(Kind.CAPTURE), int(directory), awaited)
    files: dict[Kind, Entry] = {
        kind: entry for kind, entry in entries.items() if kind is not Kind.CAPTURE
    }
    if record is not None:
        verdict = judge.judge_recorded(record)
        return [FoundSet(directory, epoch, files, verdict, record, None, None, None, "unknown")]
    by_owner: dict[int, dict[Kind, Entry]] = {}
    for kind, entry in files.items():
        by_owner.setdefault(entry.uid, {})[kind] = entry
    return [_by_appscope(directory, descriptor, epoch, own, living) for own in by_owner.values()]


def _by_appscope(
    directory: str, descriptor: int, epoch: int, files: dict[Kind, Entry], living: Living
) -> FoundSet:
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
    writer = living.writer_of(epoch, found.owner)
    return found.judged(writer, living.open_files) if writer else found.judged(None)


def is_stale(found: FoundSet) -> bool:
    """Tell whether a set was completed between the listing and the reading of its record."""
    record = found.record.record if found.record else None
    if record is None or record.state != "complete":
        return False
    here = {name for name, file in record.files.items() if file.sent is None}
    return not here <= {entry.name for entry in found.entries.values()}


def _record(directory: int, entry: Entry | None, pid: int, awaited: Awaited) -> RecordState | None:
    """Read a set's capture record; one that is not root's alone is no record."""
    if entry is None or entry.uid != 0:
        return None
    try:
        descriptor = spool.open_file(entry.name, directory, owner=0)
    except (Refused, FileNotFoundError):
        return None
    try:
        if spool.may_others_write(os.fstat(descriptor)):
            return None
        being_written = capture.is_being_written(descriptor)
        if being_written:
            awaited.is_there(pid, entry.epoch)
        record = capture.read(descriptor)
        if being_written or record.state == "complete":
            return RecordState(record, being_written)
        if awaited.is_awaited(pid, entry.epoch, partial(capture.lock, descriptor)):
            return RecordState(record, being_written, is_left=True)
        # Whoever removed its draft may have completed it since.
        being_written = not capture.lock(descriptor)
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
        descriptor = spool.open_file(entry.name, directory, entry.uid)
    except (Refused, FileNotFoundError):
        return b""
    try:
        return os.pread(descriptor, MAX_SMALL_FILE, 0)
    finally:
        os.close(descriptor)


def sent_sources(found: FoundSet) -> list[Source]:
    """Return the files of a set that are on the bus and nowhere else."""
    record = found.record.record if found.record else None
    sources = []
    for name, captured in record.files.items() if record else ():
        parsed = layout.parse_crash_file_name(name)
        if captured.sent is None or parsed is None:
            continue
        told = {
            "truncated": captured.truncated,
            "expected_size": captured.expected,
            "note": captured.note,
        }
        file = captured.sent.model_copy(update=told)
        sources.append(
            Source(
                directory=found.directory,
                name=name,
                kind=parsed[0],
                owner=0,
                note=captured.note,
                expected=captured.expected,
                file=file,
                on_bus=file.chunks,
                removed=True,
            )
        )
    return sources


def source_of(found: FoundSet, entry: Entry) -> Source:
    record = found.record.record if found.record else None
    captured = record.files.get(entry.name) if record else None
    source = Source(directory=found.directory, name=entry.name, kind=entry.kind, owner=entry.uid)
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
    if captured is not None:
        return None
    if found.verdict is Verdict.CUT_SHORT and entry.kind in judge.doubtful(found.entries.keys()):
        return "its writer ended before it was whole"
    return None
