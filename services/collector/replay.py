"""Delivering again what was given up, once a human has mended the cause."""

from crashbus.messages import DeadLetter, Replay
from services.collector.ledger import Crash, Source


def apply_replay(crash: Crash, replay: Replay) -> bool:
    """Let a destination wait again for files that it gave up; tell whether any are meant.

    The dead letters that it answers stay on the bus and count no more, also those that are read
    only after it.
    """
    manifest = [crash.manifest] if crash.manifest else []
    meant = [
        source
        for source in (*crash.sources.values(), *manifest)
        if source.name in replay.files
        and replay.destination in crash.destinations
        and replay.destination not in source.delivered
    ]
    for source in meant:
        _expect_again(crash, source, replay)
    return bool(meant)


def _expect_again(crash: Crash, source: Source, replay: Replay) -> None:
    told = source.told.get(replay.destination)
    if told is not None and told.error in crash.notes:
        crash.notes.remove(told.error)
    source.expect(replay.destination)
    source.renewed_for = max(source.renewed_for, replay.failed_at)
    source.renewals = 0
    source.released = False


def gone(replay: Replay) -> DeadLetter:
    """Return the answer to a request for a crash that this host has no files of."""
    return DeadLetter(
        host=replay.host,
        crash_id=replay.crash_id,
        service="collector",
        reason="source_vanished",
        error=f"{', '.join(replay.files)[:1000]}: this host has no record of the crash any more",
        mend="nothing can bring the files back; see what other destinations have",
    )
