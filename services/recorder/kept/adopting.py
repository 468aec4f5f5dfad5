"""Crashes that the pipe helper kept while there was no recorder."""

import os
from contextlib import suppress

from crashbus.identity import crash_id
from crashbus.layout import Kind, crash_file_name
from services.common import crash_directory, drafts
from services.common.capture import CapturedFile
from services.recorder.conditions import Conditions
from services.recorder.core.core_policy import Extent
from services.recorder.kept.orphan import Orphan
from services.recorder.kept.taking_up import locked
from services.recorder.recording import (
    Recording,
    begin,
    keep_for_another,
    say_what_is_there,
    understand,
    write_early,
)


def adopt(orphan: Orphan, on: Conditions) -> Recording:
    """Make a recording of a crash that the pipe helper kept; `finish` is still to be done.

    Raises:
        CaptureFailed, OSError: it cannot be had now; the orphan is as it was.
    """
    process = orphan.process
    name = crash_id(process.boot_id, process.pid, process.start_ticks)
    _undo_what_was_begun(orphan, name, on)
    recording = begin(name, process, orphan.signal, orphan.crashed_at, on)
    try:
        recording.fault = orphan.fault
        understand(recording, orphan.head)
        recording.notes.extend(orphan.facts.notes)
        keep_for_another(recording, orphan.facts)
        decision = on.core_policy.decide(
            process, orphan.facts.username, orphan.facts.maps, orphan.command_line
        )
        if not orphan.has_memory or decision.extent is Extent.NOTHING:
            recording.notes.append(decision.because or f"no core: {orphan.core_fault}")
            say_what_is_there(recording)
        else:
            _note_core(recording, orphan)
            say_what_is_there(recording)
            orphan.give_core(recording.directory, recording.epoch)
        orphan.is_adopted()
        write_early(recording, on)
        recording.facts, recording.core_file = orphan.facts, orphan.core
    except BaseException:
        recording.close()
        raise
    return recording


def _note_core(recording: Recording, orphan: Orphan) -> None:
    recording.core_size = orphan.core_size
    fault = orphan.core_fault or None
    recording.files[crash_file_name(Kind.CORE, recording.epoch)] = CapturedFile(
        size=orphan.core_size,
        truncated=fault is not None,
        expected=orphan.head.size if fault else None,
        note=fault,
    )
    recording.tell_final(orphan.core_size)


def _undo_what_was_begun(orphan: Orphan, name: str, on: Conditions) -> None:
    """Remove the set of a recorder that ended before the orphan was adopted.

    Raises:
        BlockingIOError: somebody is at it, or its core was there: the orphan is whole again, and
            to be read again.
        OSError: it cannot be had now.
    """
    pid = orphan.process.pid
    for epoch in (epoch for of, epoch in drafts.left(on.spool) if of == pid):
        begun = locked(on.spool, pid, epoch)
        if begun is None:
            continue
        try:
            if begun.record.crash_id == name:
                _undo(begun, orphan, on)
        finally:
            begun.close()


def _undo(begun: Recording, orphan: Orphan, on: Conditions) -> None:
    core = crash_file_name(Kind.CORE, begun.epoch)
    has_core = orphan.core < 0 and _size(core, begun.directory) > 0
    if has_core:
        orphan.take_core_back(begun.directory, begun.epoch)
    for kind in Kind:  # the record too: a draft without one is nobody's, not the other way round
        kept = crash_file_name(kind, begun.epoch)
        if crash_directory.has_file(kept, begun.directory):
            os.unlink(kept, dir_fd=begun.directory)
    drafts.remove(on.spool, orphan.process.pid, begun.epoch)
    if has_core:
        raise BlockingIOError("its core is back: it is to be read again")


def _size(name: str, directory: int) -> int:
    with suppress(FileNotFoundError):
        if crash_directory.has_file(name, directory):
            return os.stat(name, dir_fd=directory, follow_symlinks=False).st_size
    return 0
