"""The JetStream streams: what the bus keeps, for how long, and what happens when it is full.

Who may do what with them on a secured bus stands in deploy/nats/nats.conf: a new stream, subject
or request needs a line there, and in tests/security/test_accounts.py.
"""

from dataclasses import replace

from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from crashbus import layout, names
from crashbus.message_base import Message
from crashbus.messages import (
    DeadLetter,
    EventsLost,
    Manifest,
    Postponed,
    Receipt,
    Replay,
    SignalCount,
    SignalEvent,
    WorkItem,
)

_DAY = 24 * 60 * 60.0
_MIB = 1024 * 1024
_SMALL_PART = 8  # one part in so many of the room for chunks is for small files
_SMALL_LEAST = 32 * _MIB  # two of the largest small files

SIGNALS = "CRASH_SIGNALS"
FILES = "CRASH_FILES"
CHUNKS = "CRASH_CHUNKS"  # of cores and binaries
SMALL_CHUNKS = "CRASH_SMALL"  # of all other files, which pass when the former is full
REPORTS = "CRASH_REPORTS"
RECEIPTS = "CRASH_RECEIPTS"
FAILURES = "CRASH_FAILURES"
POSTPONED = "CRASH_POSTPONED"
REPLAYS = "CRASH_RETRIES"

CHUNK_SUBJECT = "crash.chunk.>"
SMALL_CHUNK_SUBJECT = "crash.small.>"


def _kept(
    name: str, *subjects: str, days: float, mib: int, newest_only: bool = False
) -> StreamConfig:
    """A stream that consumers may come late to; the oldest goes when it is full.

    Args:
        newest_only: of each subject the newest message replaces the others.
    """
    return StreamConfig(
        name=name,
        subjects=list(subjects),
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_age=days * _DAY,
        max_bytes=mib * _MIB,
        max_msgs_per_subject=1 if newest_only else -1,
        allow_direct=True,
    )


def all_streams(chunk_store_bytes: int, replicas: int = 1) -> tuple[StreamConfig, ...]:
    """Return the configuration of every stream.

    Args:
        chunk_store_bytes: room for chunks that are not delivered yet; when it is taken, the
            collector waits with its data on disk. A part of it is for small files alone.
        replicas: servers of a cluster that each keep all of it.
    """
    small = max(chunk_store_bytes // _SMALL_PART, min(_SMALL_LEAST, chunk_store_bytes // 2))
    made = (
        _kept(
            SIGNALS, SignalEvent.SUBJECT, SignalCount.SUBJECT, EventsLost.SUBJECT, days=7, mib=256
        ),
        _kept(REPORTS, Manifest.SUBJECT, days=30, mib=256),
        _kept(RECEIPTS, Receipt.SUBJECT, days=30, mib=256),
        _kept(FAILURES, DeadLetter.SUBJECT, days=30, mib=256),
        _kept(POSTPONED, Postponed.SUBJECT, days=7, mib=64, newest_only=True),
        _kept(REPLAYS, Replay.SUBJECT, days=30, mib=64),
        # A work item is gone once a shipper acknowledged it; none is ever pushed out.
        StreamConfig(
            name=FILES,
            subjects=[WorkItem.SUBJECT],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_bytes=256 * _MIB,
        ),
        _chunks(CHUNKS, CHUNK_SUBJECT, chunk_store_bytes - small),
        _chunks(SMALL_CHUNKS, SMALL_CHUNK_SUBJECT, small),
    )
    return tuple(replace(one, num_replicas=replicas) for one in made)


def _chunks(name: str, subject: str, room: int) -> StreamConfig:
    """New chunks are refused when it is full (backpressure); old ones are never dropped."""
    return StreamConfig(
        name=name,
        subjects=[subject],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        max_bytes=room,
        allow_direct=True,
    )


def chunks_of(file: str) -> str:
    """Return the name of the stream that keeps the chunks of a file with this name."""
    return CHUNKS if layout.is_large(file) else SMALL_CHUNKS


def on_the_way(crash_id: str) -> tuple[tuple[str, str], ...]:
    """Return the streams that keep work items and chunks, and the subject of a crash's in each."""
    return (
        (FILES, WorkItem.SUBJECT.replace(">", f"*.{crash_id}.>")),
        (CHUNKS, CHUNK_SUBJECT.replace(">", f"{crash_id}.>")),
        (SMALL_CHUNKS, SMALL_CHUNK_SUBJECT.replace(">", f"{crash_id}.>")),
    )


def all_on_the_way(host: str) -> tuple[tuple[str, str, int], ...]:
    """Return the same for all crashes, work items of one host's only.

    Returns:
        Stream, subject, and which of its tokens is the crash ID, from 0.
    """
    return (
        (FILES, WorkItem.SUBJECT.replace(">", f"{names.token(host)}.>"), 3),
        (CHUNKS, CHUNK_SUBJECT, 2),
        (SMALL_CHUNKS, SMALL_CHUNK_SUBJECT, 2),
    )


def stream_of(kind: type[Message]) -> str:
    """Return the name of the stream that keeps messages of this kind."""
    return _STREAM_OF[kind]


_STREAM_OF: dict[type[Message], str] = {
    SignalEvent: SIGNALS,
    SignalCount: SIGNALS,
    EventsLost: SIGNALS,
    WorkItem: FILES,
    Manifest: REPORTS,
    Receipt: RECEIPTS,
    DeadLetter: FAILURES,
    Postponed: POSTPONED,
    Replay: REPLAYS,
}
