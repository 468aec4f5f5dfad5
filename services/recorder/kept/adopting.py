"""Crashes that the pipe helper kept while there was no recorder."""

from crashbus.capture import CapturedFile
from crashbus.identity import crash_id
from crashbus.layout import Kind, crash_file_name
from services.recorder.conditions import Conditions
from services.recorder.core.core_policy import Extent
from services.recorder.kept.orphan import Orphan
from services.recorder.recording import Recording, begin, understand, write_early


def adopt(orphan: Orphan, on: Conditions) -> Recording:
    """Make a recording of a crash that the pipe helper kept; `finish` is still to be done.

    Raises:
        CaptureFailed, OSError: it cannot be had now; the orphan is as it was.
    """
    process = orphan.process
    name = crash_id(process.boot_id, process.pid, process.start_ticks)
    recording = begin(name, process, orphan.signal, orphan.crashed_at, on)
    try:
        recording.fault = orphan.fault
        understand(recording, orphan.head)
        recording.notes.extend(orphan.facts.notes)
        decision = on.core_policy.decide(process, orphan.facts.username, orphan.facts.maps)
        if not orphan.has_memory or decision.extent is Extent.NOTHING:
            recording.notes.append(decision.because or f"no core: {orphan.core_fault}")
        else:
            core = crash_file_name(Kind.CORE, recording.epoch)
            orphan.give_core(recording.directory, recording.epoch)
            recording.core_size = orphan.core_size
            fault = orphan.core_fault or None
            recording.files[core] = CapturedFile(
                size=orphan.core_size,
                truncated=fault is not None,
                expected=orphan.head.size if fault else None,
                note=fault,
            )
        orphan.is_adopted()
        write_early(recording, on)
        recording.facts, recording.core_file = orphan.facts, orphan.core
    except BaseException:
        recording.close()
        raise
    return recording
