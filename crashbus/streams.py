"""The JetStream streams: what the bus keeps, for how long, and what happens when it is full."""

from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from crashbus.messages import (
    DeadLetter,
    EventsLost,
    Manifest,
    Message,
    Receipt,
    SignalCount,
    SignalEvent,
    WorkItem,
)

_DAY = 24 * 60 * 60.0
_MIB = 1024 * 1024

SIGNALS = "CRASH_SIGNALS"
FILES = "CRASH_FILES"
CHUNKS = "CRASH_CHUNKS"
REPORTS = "CRASH_REPORTS"
RECEIPTS = "CRASH_RECEIPTS"
FAILURES = "CRASH_FAILURES"

CHUNK_SUBJECT = "crash.chunk.>"


def _kept(name: str, *subjects: str, days: float, mib: int) -> StreamConfig:
    """A stream that consumers may come late to; the oldest goes when it is full."""
    return StreamConfig(
        name=name,
        subjects=list(subjects),
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_age=days * _DAY,
        max_bytes=mib * _MIB,
        allow_direct=True,
    )


def all_streams(chunk_store_bytes: int) -> tuple[StreamConfig, ...]:
    """Return the configuration of every stream.

    Args:
        chunk_store_bytes: room for chunks that are not delivered yet; when it is taken, the
            collector waits with its data on disk.
    """
    return (
        _kept(
            SIGNALS, SignalEvent.SUBJECT, SignalCount.SUBJECT, EventsLost.SUBJECT, days=7, mib=256
        ),
        _kept(REPORTS, Manifest.SUBJECT, days=30, mib=256),
        _kept(RECEIPTS, Receipt.SUBJECT, days=30, mib=256),
        _kept(FAILURES, DeadLetter.SUBJECT, days=30, mib=256),
        # A work item is gone once a shipper acknowledged it; none is ever pushed out.
        StreamConfig(
            name=FILES,
            subjects=[WorkItem.SUBJECT],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_bytes=256 * _MIB,
        ),
        # New chunks are refused when it is full (backpressure); old ones are never dropped.
        StreamConfig(
            name=CHUNKS,
            subjects=[CHUNK_SUBJECT],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_bytes=chunk_store_bytes,
            allow_direct=True,
        ),
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
}
