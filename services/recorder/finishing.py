"""What is done of a crash when its process is let go: backtrace, snapshot, and the record.

The record, complete, is unlocked last.
"""

import os
import time
from contextlib import suppress

import structlog

from crashbus import elf
from crashbus.layout import Kind, crash_file_name
from crashbus.parts import Module
from services.common import drafts
from services.recorder import crash_files, metrics
from services.recorder.conditions import Conditions
from services.recorder.errors import CaptureFailed
from services.recorder.facts import Facts
from services.recorder.recording import Recording, add_container, keep_record, write_file
from services.recorder.unwinding import backtrace_json, fingerprint, unwinder
from services.recorder.unwinding.backtrace import Backtrace

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def finish(recording: Recording, on: Conditions, backtrace_within: float) -> None:
    """Do what does not need the process, and complete the record.

    Raises:
        CaptureFailed: no file of the crash could be made.
    """
    try:
        assert recording.facts is not None
        add_container(recording)
        until = time.monotonic() + backtrace_within
        _fetch_debug_information(recording.facts, backtrace_within / 2, on)
        backtrace_within = until - time.monotonic()
        trace = _backtrace(recording, recording.facts, backtrace_within, on)
        if trace.fault:
            recording.notes.append(f"backtrace failed: {trace.fault}")
        _write_backtrace(recording, recording.facts, trace)
        write_file(recording, Kind.SNAPSHOT, _snapshot(recording, recording.facts, trace, on))
        binaries = _binaries(recording, recording.facts, trace, on)
        # After all that takes time, for who is killed now leaves a core without its stacks; before
        # the record tells that it is whole.
        _end_core(recording)
        _complete(recording, trace, binaries)
        if not recording.files:
            raise _nothing_kept(recording, on)
        # The record first: without both a set would be nobody's.
        drafts.remove(on.spool, recording.record.process.pid, recording.epoch)
    finally:
        recording.close()
    _say(recording)


def _nothing_kept(recording: Recording, on: Conditions) -> CaptureFailed:
    """Remove a record that tells of no file; nobody would look at it."""
    record = crash_file_name(Kind.CAPTURE, recording.epoch)
    with suppress(OSError):
        os.unlink(record, dir_fd=recording.directory)
    drafts.remove(on.spool, recording.record.process.pid, recording.epoch)
    failure = CaptureFailed(
        "capture_failed",
        "; ".join(recording.notes),
        f"make room on the spool's disk: df {on.spool}; df -i {on.spool}",
    )
    failure.crash_id = recording.record.crash_id
    return failure


def _end_core(recording: Recording) -> None:
    """Cut a core where what another recorder had copied of it ends; its stacks were read."""
    if recording.core_ends is not None:
        with suppress(OSError):  # its record tells what is of use
            os.ftruncate(recording.core_file, recording.core_ends)


def _fetch_debug_information(known: Facts, within: float, on: Conditions) -> None:
    found = (elf.build_id(module.file) for module in known.modules if module.is_local)
    on.debuginfod.fetch((one for one in found if one is not None), within)


def _binaries(
    recording: Recording, known: Facts, trace: Backtrace, on: Conditions
) -> tuple[Module, ...]:
    if recording.core_file < 0:
        return ()
    try:
        read = {one.start: one.build_id for one in trace.modules if one.build_id}
        return on.binaries.keep(known.modules, read)
    except OSError as error:
        recording.notes.append(f"its binaries are not kept: {error.strerror}")
        return ()


def _complete(recording: Recording, trace: Backtrace, modules: tuple[Module, ...]) -> None:
    """Complete the record; on a full disk without modules and labels, which are most of it."""
    recording.record = recording.record.model_copy(
        update={
            "state": "complete",
            "fingerprint": _fingerprint(recording, trace),
            "build_fingerprint": fingerprint.of_build(recording.record.signal_name, trace.calls()),
            "files": recording.files,
            "modules": modules,
            "notes": tuple(recording.notes),
        }
    )
    if not keep_record(recording):
        process, container = recording.record.process, recording.record.process.container
        bare = container and container.model_copy(update={"labels": {}})
        update = {"modules": (), "process": process.model_copy(update={"container": bare})}
        recording.record = recording.record.model_copy(update=update)
        keep_record(recording)


def _write_backtrace(recording: Recording, known: Facts, trace: Backtrace) -> None:
    thread_names, registers = known.thread_names, recording.head.registers
    text = crash_files.backtrace(recording.cause, trace, thread_names, registers)
    write_file(recording, Kind.BACKTRACE, text)
    document = backtrace_json.content(
        crash_id=recording.record.crash_id,
        cause=recording.cause,
        fault=recording.fault,
        trace=trace,
        fingerprint=_fingerprint(recording, trace),
        thread_names=thread_names,
        registers=registers,
    )
    write_file(recording, Kind.BACKTRACE_JSON, document)


def _fingerprint(recording: Recording, trace: Backtrace) -> str | None:
    process = recording.record.process
    program, name = process.executable or process.comm, recording.record.signal_name
    return fingerprint.fingerprint(name, program, trace.calls())


def _backtrace(recording: Recording, known: Facts, within: float, on: Conditions) -> Backtrace:
    if recording.core_file < 0:
        return Backtrace(fault="there is no core")
    return unwinder.unwind(
        recording.core_file,
        known.modules,
        within,
        recording.head,
        recording.code,
        on.debug_directories,
        on.unwind_server,
    )


def _snapshot(recording: Recording, known: Facts, trace: Backtrace, on: Conditions) -> bytes:
    return crash_files.snapshot(
        version=on.version,
        crash_id=recording.record.crash_id,
        crashed_at=recording.record.crashed_at,
        host=on.host,
        facts=known,
        cause=recording.cause,
        tid=recording.head.tid,
        fault=recording.fault,
        trace=trace,
        fingerprint=_fingerprint(recording, trace),
        held_for=recording.held_for,
        core_size=recording.core_size,
    )


def _say(recording: Recording) -> None:
    record = recording.record
    truncated = any(file.truncated for file in recording.files.values())
    metrics.CAPTURES.labels("truncated" if truncated else "complete").inc()
    log.info(
        "captured",
        crash_id=record.crash_id,
        pid=record.process.pid,
        comm=record.process.comm,
        signal=record.signal_name,
        epoch=recording.epoch,
        core_bytes=recording.core_size,
        held_ms=None if recording.held_for is None else round(recording.held_for * 1000, 1),
        took_ms=round((time.time() - record.crashed_at) * 1000),
        notes=list(record.notes) + [f.note for f in recording.files.values() if f.note],
    )
