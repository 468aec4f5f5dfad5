"""Capture records that the collector makes itself, of sets that no recorder makes."""

from collections.abc import Mapping
from typing import Literal

from crashbus.messages import SignalEvent
from services.common.capture import CapturedFile, CaptureRecord


def record_of(
    event: SignalEvent,
    state: Literal["writing", "complete"],
    files: Mapping[str, CapturedFile],
    note: str,
) -> CaptureRecord:
    """Return the record of a set that tells of an event."""
    return CaptureRecord(
        state=state,
        crash_id=event.crash_id,
        host=event.host,
        crashed_at=event.time,
        process=event.process,
        signal=event.signal,
        signal_name=event.signal_name,
        code=event.code,
        code_meaning=event.code_meaning,
        fault_address=event.fault_address,
        files=dict(files),
        notes=(note,),
    )
