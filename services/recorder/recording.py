"""One crash, from its arrival to its files.

The order is what matters. While the process is held: who it is, a locked capture record (so
that from now on everyone sees that files will come), the rest of /proc, why it died, its
binaries, then the core. Then it is let go. Backtrace and snapshot follow without it, and the
record, complete, is unlocked last.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import structlog

from crashbus import capture, elf, fingerprint, signals
from crashbus.capture import CapturedFile, CaptureRecord
from crashbus.identity import boot_id, crash_id
from crashbus.layout import Kind, crash_file_name
from crashbus.messages import Module, Process
from services.common import crash_directory
from services.common.crash_directory import SpoolUnusable
from services.common.settings import BusSettings
from services.common.unrecorded import Unrecorded
from services.recorder import (
    arrival,
    backtrace_json,
    containers,
    core_copy,
    core_head,
    crash_files,
    facts,
    fault_address,
    metrics,
    room,
    unwinder,
)
from services.recorder.backtrace import Backtrace
from services.recorder.binaries import Binaries
from services.recorder.containers import Answer, Runtime
from services.recorder.core_head import Cause, Head
from services.recorder.core_pages import Pages
from services.recorder.core_policy import CorePolicy, Extent
from services.recorder.debuginfod import Debuginfod
from services.recorder.errors import CaptureFailed
from services.recorder.facts import Facts
from services.recorder.hold import Hold
from services.recorder.mechanism import Mechanism
from services.recorder.orphans import Orphan
from services.recorder.settings import RecorderSettings
from services.recorder.taking import Taken, Taker
from services.recorder.unwind_process import Server as UnwindServer

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MODULE_FILES = 64  # opened for one crash: most programs map fewer libraries
_PLACES_TRIED = 64  # others can take a name, and the collector remove the directory, meanwhile


@dataclass(frozen=True)
class Conditions:
    """What is the same for every crash.

    Attributes:
        mechanism: how crashes arrive.
        configuration: what ``cfg`` shows.
        module_files: how many descriptors one crash may keep open for its modules now.
        on_want_of_room: told how many bytes the last core wanted in vain; 0: it had them.
        unwind_server: has workers ready; without it each is started for itself.
    """

    mechanism: Mechanism
    host: str
    boot_id: str
    spool: Path
    version: str
    max_core_bytes: int
    core_policy: CorePolicy
    runtime: Runtime | None
    only_stream: bool  # read no memory but what the kernel sends
    taker: Taker | None  # of small processes; None: none is let go that early
    disk_reserve: float  # percent
    binaries: Binaries
    debug_directories: tuple[Path, ...]
    debuginfod: Debuginfod
    configuration: Mapping[str, Any]
    module_files: Callable[[], int]
    on_want_of_room: Callable[[int], None]
    unwind_server: UnwindServer | None = None

    @classmethod
    def of(
        cls,
        shared: BusSettings,
        settings: RecorderSettings,
        configuration: Mapping[str, Any],
        mechanism: Mechanism = Mechanism.SOCKET,
        module_files: Callable[[], int] = lambda: MODULE_FILES,
        on_want_of_room: Callable[[int], None] = lambda _: None,
    ) -> Self:
        """Return what the settings say."""
        return cls(
            mechanism=mechanism,
            host=shared.host,
            boot_id=boot_id(),
            spool=shared.spool,
            version=version("crashbus"),
            max_core_bytes=settings.max_core_bytes,
            core_policy=CorePolicy(
                Extent.STACKS if settings.core == "stacks" else Extent.ALL,
                settings.core_off_rules,
                settings.loop_burst,
                settings.loop_one_in,
            ),
            runtime=Runtime(settings.runtime_socket) if settings.runtime_socket else None,
            only_stream=settings.core_source == "stream",
            taker=_taker(shared.spool, settings),
            disk_reserve=settings.disk_reserve,
            binaries=Binaries(
                shared.spool,
                settings.max_binary_bytes,
                settings.disk_reserve,
                settings.debug_directories,
            ),
            debug_directories=settings.debug_directories,
            debuginfod=Debuginfod(
                settings.debuginfod_servers,
                settings.debuginfod_cache,
                settings.debuginfod_deadline,
                settings.max_binary_bytes,
                settings.debuginfod_cache_bytes,
            ),
            configuration=configuration,
            module_files=module_files,
            on_want_of_room=on_want_of_room,
        )


def _taker(spool: Path, settings: RecorderSettings) -> Taker | None:
    if settings.core_source == "stream":
        return None
    asks_runtime = settings.runtime_socket is not None
    return Taker(Unrecorded(spool), settings.max_core_bytes, labels_needed=asks_runtime)


@dataclass
class Recording:
    """A crash whose process is gone and whose files are not all there yet.

    It holds three descriptors, besides those of the modules: the set counts as being written
    as long as the record's is open.
    """

    directory: int
    record_file: int
    epoch: int
    record: CaptureRecord
    container: Answer | None = None  # of the container runtime
    core_file: int = -1
    facts: Facts | None = None
    cause: Cause = field(default_factory=lambda: Cause(0))
    head: Head = field(default_factory=lambda: Head(b""))  # of its core, without the bytes
    code: bytes | None = None  # at the program counter, if that is where it faulted
    fault: str | None = None  # what the fault address was
    held_for: float | None = None
    core_size: int = 0
    files: dict[str, CapturedFile] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Give all descriptors back; this is what unlocks the record."""
        if self.facts is not None:
            self.facts.close()
        for descriptor in (self.core_file, self.directory, self.record_file):
            if descriptor >= 0:
                os.close(descriptor)


def capture_crash(hold: Hold, on: Conditions) -> Recording:
    """Do all that needs the process, and let it go as soon as that can be.

    Raises:
        CaptureFailed: nothing of the crash could be kept.
    """
    taken = Taken()
    try:
        arrived = arrival.receive(on.mechanism, hold)
        hold.belongs_to(arrived.pid)
        if on.taker is not None:
            taken = on.taker.take(arrived.pid, hold, on.module_files())
        process = facts.read_identity(arrived.pid, on.boot_id, taken.proc)
        return capture_process(process, arrived.signal, hold, on, taken)
    finally:
        hold.close()
        taken.close()
        if hold.held_for is not None:
            metrics.HOLD_SECONDS.observe(hold.held_for)


def capture_process(
    process: Process, signal: int, hold: Hold, on: Conditions, taken: Taken | None = None
) -> Recording:
    """Do all that needs a process that is held, then let it go; see `capture_crash`.

    Args:
        taken: what was read of it already.
    """
    name = crash_id(process.boot_id, process.pid, process.start_ticks)
    try:
        recording = _begin(name, process, signal, hold.arrived_at, on)
    except CaptureFailed as failure:
        failure.crash_id = name
        raise
    try:
        _fill(recording, hold, on, taken or Taken())
    except BaseException:
        recording.close()
        raise
    return recording


def adopt(orphan: Orphan, on: Conditions) -> Recording:
    """Make a recording of a crash that the pipe helper kept; `finish` is still to be done.

    Raises:
        CaptureFailed, OSError: it cannot be had now; the orphan is as it was.
    """
    process = orphan.process
    name = crash_id(process.boot_id, process.pid, process.start_ticks)
    recording = _begin(name, process, orphan.signal, orphan.crashed_at, on)
    try:
        recording.fault = orphan.fault
        _understand(recording, orphan.head)
        recording.notes.extend(orphan.facts.notes)
        decision = on.core_policy.decide(process, orphan.facts.username)
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
        _write_early(recording, on)
        recording.facts, recording.core_file = orphan.facts, orphan.core
    except BaseException:
        recording.close()
        raise
    return recording


def _begin(
    name: str, process: Process, signal: int, crashed_at: float, on: Conditions
) -> Recording:
    """Make the record: from here on the crash cannot vanish unseen."""
    record = CaptureRecord(
        state="writing",
        crash_id=name,
        host=on.host,
        crashed_at=crashed_at,
        process=process,
        signal=signal,
        signal_name=signals.name(signal),
    )
    epoch = int(crashed_at)
    for _ in range(_PLACES_TRIED):
        try:
            directory, epoch = crash_directory.open_crash(on.spool, process.pid, epoch)
        except SpoolUnusable as error:
            raise CaptureFailed("spool_unusable", str(error), error.mend) from error
        try:
            record_file = capture.create(directory, epoch, record)
        except (FileExistsError, FileNotFoundError):
            os.close(directory)
            continue
        except OSError as error:
            os.close(directory)
            raise _no_record(on.spool, error) from error
        return Recording(directory, record_file, epoch, record, cause=Cause(signal))
    raise _no_record(on.spool, OSError(None, "its place is taken or removed at once"))


def _no_record(path: Path, error: OSError) -> CaptureFailed:
    return CaptureFailed(
        "capture_failed",
        f"no capture record could be made in {path}: {error.strerror}",
        f"make room on its disk: df {path}; df -i {path}",
    )


def _fill(recording: Recording, hold: Hold, on: Conditions, taken: Taken) -> None:
    container = recording.record.process.container
    if on.runtime is not None and container is not None:
        recording.container = on.runtime.ask(container)
    recording.facts = facts.read_rest(recording.record.process, taken.proc, taken.resources)
    recording.notes.extend(recording.facts.notes)
    head = taken.head or core_head.from_hold(hold)
    _understand(recording, head)
    _explain_fault(recording)
    recording.code = taken.code
    if taken.memory is None:
        recording.code = facts.code_at_fault(recording.facts.task, head, recording.facts.maps)
    _write_early(recording, on)
    recording.facts = facts.with_modules(recording.facts, on.module_files(), taken.take_files())
    _write_core(recording, hold, head, on, taken)
    hold.let_go()
    recording.held_for = hold.held_for


def _understand(recording: Recording, head: Head) -> None:
    """Take in what the core's head tells, and keep it."""
    if head.cause is not None:
        recording.cause = head.cause
    if head.fault is not None:
        recording.notes.append(head.fault)
    recording.head = replace(head, raw=b"")
    recording.record = _with_cause(recording.record, recording.cause)
    _keep(recording)


def _explain_fault(recording: Recording) -> None:
    """Look the fault address up in the mappings."""
    known, cause = recording.facts, recording.cause
    assert known is not None
    if cause.fault_address is not None and known.maps:
        recording.fault = fault_address.describe(known.maps, cause.fault_address)


def _pages(recording: Recording, head: Head, on: Conditions, taken: Taken) -> Pages | None:
    """Say where the core's memory can be read; drop the mappings, which have megabytes."""
    known = recording.facts
    assert known is not None
    recording.facts = replace(known, maps=b"")
    taken.proc.forget(f"{known.task}/maps")
    if on.only_stream or head.fault is not None or not 0 < len(known.maps) < facts.MAX_MAPS:
        return None
    return Pages(known.task, head, known.maps, taken.memory)


def _with_cause(record: CaptureRecord, cause: Cause) -> CaptureRecord:
    return record.model_copy(
        update={
            "signal": cause.signal,
            "signal_name": signals.name(cause.signal),
            "code": cause.code,
            "code_meaning": None
            if cause.code is None
            else signals.code_meaning(cause.signal, cause.code),
            "fault_address": cause.fault_address,
        }
    )


def _keep(recording: Recording) -> bool:
    """Bring the record on disk up to date; a full disk must not keep the process held."""
    try:
        capture.write(recording.record_file, recording.record)
        return True
    except OSError as error:
        log.error(
            "the capture record could not be written",
            crash_id=recording.record.crash_id,
            error=error.strerror,
        )
        return False


def _write_early(recording: Recording, on: Conditions) -> None:
    """Write the files that are known already, before a core can fill the disk."""
    process = recording.record.process
    text = crash_files.info(on.version, recording.epoch, process.pid, process.comm)
    _write_file(recording, Kind.INFO, text)
    _write_file(recording, Kind.CFG, crash_files.cfg(on.configuration))


def _write_core(recording: Recording, hold: Hold, head: Head, on: Conditions, taken: Taken) -> None:
    assert recording.facts is not None
    name = crash_file_name(Kind.CORE, recording.epoch)
    if on.core_policy.asks_for_labels:
        _add_container(recording)
    decision = on.core_policy.decide(recording.record.process, recording.facts.username)
    pages = _pages(recording, head, on, taken)
    try:
        recording.core_file = _new_core(recording, decision.extent)
    except OSError as error:
        recording.notes.append(f"{name} could not be made: {error.strerror}")
        return
    free = room.for_core(recording.core_file, on.disk_reserve)
    limit = min(on.max_core_bytes or free, free)
    copied = core_copy.copy(
        hold, head.raw, head.size, recording.core_file, limit, pages, decision.because
    )
    fault = copied.fault or (head.fault if head.cause is None else None)
    if decision.extent is Extent.NOTHING:
        recording.notes.append(decision.because)
    else:
        recording.core_size = copied.size
        recording.files[name] = CapturedFile(
            size=copied.size,
            truncated=fault is not None,
            expected=head.size if fault else None,
            in_order=copied.in_order,
            note=fault,
        )
    metrics.CORE_BYTES.inc(copied.size)
    lacked = copied.disk_full or (fault is not None and (head.size or 0) > free)
    on.on_want_of_room((head.size or 1) if lacked else 0)
    if copied.fault:
        hold.let_go(copied.fault)


def _add_container(recording: Recording) -> None:
    """Add what the runtime says of the container, if it answers."""
    found = containers.answered(recording.container)
    if found is not None:
        process = recording.record.process.model_copy(update={"container": found})
        recording.record = recording.record.model_copy(update={"process": process})
        assert recording.facts is not None
        recording.facts = replace(recording.facts, process=process)


def _new_core(recording: Recording, extent: Extent) -> int:
    """Make the file of a core; one that is not to be kept has no name."""
    if extent is not Extent.NOTHING:
        return crash_directory.create_file(recording.directory, Kind.CORE, recording.epoch)
    name, descriptor = crash_directory.hidden_file(Kind.CORE, recording.directory)
    os.unlink(name, dir_fd=recording.directory)
    return descriptor


def _write_file(recording: Recording, kind: Kind, content: bytes) -> None:
    """Write one small file; what is missing is told in the record."""
    name = crash_file_name(kind, recording.epoch)
    try:
        descriptor = crash_directory.create_file(recording.directory, kind, recording.epoch)
    except OSError as error:
        recording.notes.append(f"{name} could not be made: {error.strerror}")
        return
    fault, size = None, 0
    try:
        while size < len(content):
            size += os.pwrite(descriptor, content[size:], size)
    except OSError as error:
        fault = f"cut short: {error.strerror}"
    finally:
        os.close(descriptor)
    recording.files[name] = CapturedFile(size=size, truncated=fault is not None, note=fault)


def finish(recording: Recording, on: Conditions, backtrace_within: float) -> None:
    """Do what does not need the process, and complete the record."""
    try:
        assert recording.facts is not None
        _add_container(recording)
        until = time.monotonic() + backtrace_within
        _fetch_debug_information(recording.facts, backtrace_within / 2, on)
        backtrace_within = until - time.monotonic()
        trace = _backtrace(recording, recording.facts, backtrace_within, on)
        if trace.fault:
            recording.notes.append(f"backtrace failed: {trace.fault}")
        _write_backtrace(recording, recording.facts, trace)
        _write_file(recording, Kind.SNAPSHOT, _snapshot(recording, recording.facts, trace, on))
        _complete(recording, trace, _binaries(recording, recording.facts, on))
    finally:
        recording.close()
    _say(recording)


def _fetch_debug_information(known: Facts, within: float, on: Conditions) -> None:
    found = (elf.build_id(module.file) for module in known.modules if module.file >= 0)
    on.debuginfod.fetch((one for one in found if one is not None), within)


def _binaries(recording: Recording, known: Facts, on: Conditions) -> tuple[Module, ...]:
    if recording.core_file < 0:
        return ()
    try:
        return on.binaries.keep(known.modules)
    except OSError as error:
        recording.notes.append(f"its binaries are not kept: {error.strerror}")
        return ()


def _complete(recording: Recording, trace: Backtrace, modules: tuple[Module, ...]) -> None:
    """Complete the record; on a full disk without modules and labels, which are most of it."""
    recording.record = recording.record.model_copy(
        update={
            "state": "complete",
            "fingerprint": _fingerprint(recording, trace),
            "files": recording.files,
            "modules": modules,
            "notes": tuple(recording.notes),
        }
    )
    if not _keep(recording):
        process, container = recording.record.process, recording.record.process.container
        bare = container and container.model_copy(update={"labels": {}})
        update = {"modules": (), "process": process.model_copy(update={"container": bare})}
        recording.record = recording.record.model_copy(update=update)
        _keep(recording)


def _write_backtrace(recording: Recording, known: Facts, trace: Backtrace) -> None:
    thread_names, registers = known.thread_names, recording.head.registers
    text = crash_files.backtrace(recording.cause, trace, thread_names, registers)
    _write_file(recording, Kind.BACKTRACE, text)
    document = backtrace_json.content(
        crash_id=recording.record.crash_id,
        cause=recording.cause,
        fault=recording.fault,
        trace=trace,
        fingerprint=_fingerprint(recording, trace),
        thread_names=thread_names,
        registers=registers,
    )
    _write_file(recording, Kind.BACKTRACE_JSON, document)


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
