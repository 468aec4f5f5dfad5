"""What is done while a crashing process is held.

The order is what matters: who it is, a locked capture record (so that from now on everyone
sees that files will come), the rest of /proc, why it died, its binaries, then the core. Then it
is let go. What does not need it is for `finishing`.
"""

import os
from dataclasses import replace

from crashbus.capture import CapturedFile
from crashbus.identity import crash_id
from crashbus.layout import Kind, crash_file_name
from crashbus.messages import Process
from services.common import crash_directory
from services.recorder import arrival, core_copy, core_head, facts, fault_address, metrics, room
from services.recorder.conditions import Conditions
from services.recorder.core_head import Head
from services.recorder.core_pages import Pages
from services.recorder.core_policy import Extent
from services.recorder.errors import CaptureFailed
from services.recorder.hold import Hold
from services.recorder.recording import Recording, add_container, begin, understand, write_early
from services.recorder.taking import Taken


def capture_crash(hold: Hold, on: Conditions) -> Recording:
    """Do all that needs the process, and let it go as soon as that can be.

    Raises:
        CaptureFailed: nothing of the crash could be kept.
    """
    taken = Taken()
    try:
        arrived = arrival.receive(on.mechanism, hold)
        hold.belongs_to(arrived.pid)
        if on.taker is not None and on.chain is None:  # a former handler wants the process, too
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
        recording = begin(name, process, signal, hold.arrived_at, on)
    except CaptureFailed as failure:
        failure.crash_id = name
        raise
    try:
        _fill(recording, hold, on, taken or Taken())
    except BaseException:
        recording.close()
        raise
    return recording


def _fill(recording: Recording, hold: Hold, on: Conditions, taken: Taken) -> None:
    container = recording.record.process.container
    if on.runtime is not None and container is not None:
        recording.container = on.runtime.ask(container)
    recording.facts = facts.read_rest(recording.record.process, taken.proc, taken.resources)
    recording.notes.extend(recording.facts.notes)
    head = taken.head or core_head.from_hold(hold)
    understand(recording, head)
    _explain_fault(recording)
    recording.code = taken.code
    if taken.memory is None:
        recording.code = facts.code_at_fault(recording.facts.task, head, recording.facts.maps)
    write_early(recording, on)
    recording.facts = facts.with_modules(recording.facts, on.module_files(), taken.take_files())
    _write_core(recording, hold, head, on, taken)
    hold.let_go()
    recording.held_for = hold.held_for


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


def _write_core(recording: Recording, hold: Hold, head: Head, on: Conditions, taken: Taken) -> None:
    assert recording.facts is not None
    name = crash_file_name(Kind.CORE, recording.epoch)
    if on.core_policy.asks_for_labels:
        add_container(recording)
    decision = on.core_policy.decide(recording.record.process, recording.facts.username)
    pages = _pages(recording, head, on, taken)
    try:
        recording.core_file = _new_core(recording, decision.extent)
    except OSError as error:
        recording.notes.append(f"{name} could not be made: {error.strerror}")
        _chain(recording, hold, on)
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
    _chain(recording, hold, on)
    if copied.fault:
        hold.let_go(copied.fault)


def _chain(recording: Recording, hold: Hold, on: Conditions) -> None:
    """Hand the process on to who had core_pattern before; what is no core for us is none for it."""
    if on.chain is None:
        return
    name, crash_id = crash_file_name(Kind.CORE, recording.epoch), recording.record.crash_id
    if name in recording.files:
        on.chain.add(crash_id, hold, recording.core_file)
    else:
        on.chain.skip(crash_id, recording.notes[-1])


def _new_core(recording: Recording, extent: Extent) -> int:
    """Make the file of a core; one that is not to be kept has no name."""
    if extent is not Extent.NOTHING:
        return crash_directory.create_file(recording.directory, Kind.CORE, recording.epoch)
    name, descriptor = crash_directory.hidden_file(Kind.CORE, recording.directory)
    os.unlink(name, dir_fd=recording.directory)
    return descriptor
