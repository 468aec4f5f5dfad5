"""What is to be done for a crash, told by its entry in the ledger alone; no I/O."""

import structlog

from crashbus import destination as destinations
from crashbus.layout import LARGE, MANIFEST_NAME, Kind, parse_crash_file_name
from crashbus.messages import DeadLetter, Receipt, WorkItem
from crashbus.parts import CrashFile
from services.collector import metrics
from services.collector.ledger import Crash, Source, Told

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_TOLD = 2000  # characters of a dead letter that are kept
RENEWALS = 5  # times that chunks are published again because a shipper missed or misread some
PUBLISH_ANEW = 1 << 40  # chunks: more than there are
RENEWED = {"chunks_missing", "damaged_file"}  # reasons that a fresh copy of the source mends


def wants(destination: str, kind: Kind) -> bool:
    """Tell whether a file of this kind is to be delivered to this destination."""
    return destinations.parse(destination).wants(kind)


def waiting(crash: Crash, source: Source) -> tuple[str, ...]:
    """Return the destinations that still wait for a file."""
    wanted = tuple(d for d in crash.destinations if wants(d, source.kind))
    return source.waits_for(wanted)


def work_items(crash: Crash, core: bool) -> list[WorkItem]:
    """Return what the shippers have to do for a crash, in order.

    A destination that takes its small files together gets one item for each set, whole and
    in name order, as AppScope's daemon sends them; all others get an item for each file.

    Args:
        core: return the items of core dumps and binaries, or those of all other files.
    """
    sources = [s for s in crash.in_order() if s.file and (s.kind in LARGE) is core]
    items = []
    for place in crash.destinations:
        together = destinations.parse(place).ships_together and not core
        for group in _sets(sources) if together else [[s] for s in sources]:
            if any(place in waiting(crash, source) for source in group):
                files = tuple(s.file for s in group if s.file)
                items.append(item_for(crash, place, files))
    return sorted(items, key=lambda item: files_rank(item.files))


def _sets(sources: list[Source]) -> list[list[Source]]:
    """Group files by the set they belong to, each in name order."""
    groups: dict[tuple[str, int], list[Source]] = {}
    for source in sorted(sources, key=lambda s: s.name):
        parsed = parse_crash_file_name(source.name)
        groups.setdefault((source.directory, parsed[1] if parsed else 0), []).append(source)
    return list(groups.values())


def files_rank(files: tuple[CrashFile, ...]) -> int:
    """Return where a work item stands in shipping order."""
    order = list(Kind)
    return min(order.index(file.kind) for file in files)


def item_for(crash: Crash, destination: str, files: tuple[CrashFile, ...]) -> WorkItem:
    """Return the item that has these files delivered there."""
    return WorkItem(
        host=crash.host,
        crash_id=crash.crash_id,
        crashed_at=crash.crashed_at,
        process_name=crash.process.comm,
        destination=destination,
        files=files,
    )


def is_wanted(crash: Crash, item: WorkItem) -> bool:
    """Tell whether an item's destination still waits for one of its files."""
    names = {file.name for file in item.files}
    return any(
        source.name in names and item.destination in waiting(crash, source)
        for source in all_sources(crash)
    )


def is_unfinished(crash: Crash) -> bool:
    """Tell whether there is something left to do for a crash, beyond what failed for good."""
    if crash.reported is None or any(waiting(crash, s) for s in all_sources(crash)):
        return True
    # manifest.json is still to come where nothing failed.
    return not any(s.failed for s in all_sources(crash)) and crash.delivered_at is None


def has_large_to_send(crash: Crash) -> bool:
    """Tell whether a destination waits for a core or a binary."""
    return any(s.kind in LARGE and waiting(crash, s) for s in crash.sources.values())


def has_small_to_offer(crash: Crash) -> bool:
    """Tell whether a destination waits for a small file that it was never offered."""
    small = (source for source in crash.sources.values() if source.kind not in LARGE)
    unread = any(source.file is None and waiting(crash, source) for source in small)
    return unread or any(one.subject not in crash.offered for one in work_items(crash, False))


def new_manifest() -> Source:
    """Return the source of a manifest.json that is not made yet."""
    return Source(directory="0", name=MANIFEST_NAME, kind=Kind.MANIFEST)


def without_manifest(crash: Crash) -> list[str]:
    """Return the destinations that have all other files of a crash and wait for manifest.json."""
    return [
        place
        for place in waiting(crash, crash.manifest or new_manifest())
        if all(place in s.delivered for s in crash.sources.values() if wants(place, s.kind))
    ]


def is_whole(crash: Crash) -> bool:
    """Tell whether no file of a crash is lost."""
    return not any(source.lost for source in crash.sources.values())


def is_everywhere(crash: Crash) -> bool:
    """Tell whether every destination has all that can still come, with manifest.json if it can."""
    needed = [source for source in crash.sources.values() if not source.lost]
    if is_whole(crash):
        needed.append(crash.manifest or new_manifest())
    return all(
        place in source.delivered
        for source in needed
        for place in crash.destinations
        if wants(place, source.kind)
    )


def all_sources(crash: Crash) -> list[Source]:
    """Return all files, manifest.json among them once there is one."""
    return [*crash.sources.values(), *([crash.manifest] if crash.manifest else [])]


def source_of(crash: Crash, file: CrashFile) -> Source | None:
    """Return the source a message speaks of, if size and hash are those of the source."""
    for source in all_sources(crash):
        known = source.file
        if source.name == file.name and known is not None:
            same = (known.size, known.sha256) == (file.size, file.sha256)
            return source if same else None
    return None


def apply_receipt(crash: Crash, receipt: Receipt) -> bool:
    """Note that a file lies at a destination; a receipt for other bytes counts for nothing."""
    source = source_of(crash, receipt.file)
    if source is None or receipt.destination not in crash.destinations:
        return False
    if receipt.destination in source.delivered:
        return False
    source.expect(receipt.destination)
    source.delivered.append(receipt.destination)
    return True


def apply_failure(crash: Crash, letter: DeadLetter) -> bool:
    """Note that a destination gave files up, or missed their chunks; False if it is nothing new."""
    if letter.work is None:
        return False
    changed = False
    for file in letter.work.files:
        source = source_of(crash, file)
        place = letter.work.destination
        if source is None or place not in waiting(crash, source):
            continue
        if letter.time < source.offered_at or letter.time <= source.renewed_for:
            continue  # it speaks of an earlier try, or was heeded already
        changed = True
        # What lies on the bus alone cannot be published anew: it stays there for a replay.
        if letter.reason in RENEWED and source.renewals < RENEWALS and not source.removed:
            source.renewals += 1
            source.renewed_for = letter.time
            source.on_bus = PUBLISH_ANEW
            log.warning("publishing again", crash_id=crash.crash_id, file=file.name)
            continue
        told = Told(error=letter.error[:_TOLD], mend=letter.mend[:_TOLD])
        source.give_up(place, letter.reason, told)
        metrics.FAILED.inc()
        log.error(
            "a destination failed for good",
            crash_id=crash.crash_id,
            file=file.name,
            destination=place,
            reason=letter.reason,
        )
    return changed
