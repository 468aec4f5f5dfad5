"""What is done while a crashing process is held.

The order is what matters: who it is, a locked capture record (so that from now on everyone
sees that files will come), the rest of /proc, why it died, its binaries, then the core. Then it
is let go. What does not need it is for `finishing`.
"""

from dataclasses import replace

from crashbus.identity import crash_id
from crashbus.parts import Process
from services.recorder import facts, metrics, modules
from services.recorder.conditions import Conditions
from services.recorder.core import core_head
from services.recorder.core.core_writing import write_core
from services.recorder.errors import CaptureFailed
from services.recorder.handover import arrival
from services.recorder.handover.hold import Hold
from services.recorder.recording import (
    Recording,
    begin,
    keep_for_another,
    understand,
    write_early,
)
from services.recorder.taker.taken import Taken
from services.recorder.unwinding import fault_address


def capture_crash(hold: Hold, on: Conditions) -> Recording:
    """Do all that needs the process, and let it go as soon as that can be.

    Raises:
        CaptureFailed: nothing of the crash could be kept.
    """
    taken = Taken()
    try:
        taker = on.early_taker
        arrived = arrival.receive(on.mechanism, hold, taker.greet if taker is not None else None)
        if taker is not None:
            mark = arrival.mark_size(on.mechanism)
            taken = taker.take(arrived.pid, hold, mark, on.module_files())
        if taken.memory is None:
            arrival.confirm(on.mechanism, hold)
        process = facts.read_identity(arrived.pid, on.boot_id, taken.proc)
        name = crash_id(process.boot_id, process.pid, process.start_ticks)
        return capture_process(name, process, arrived.signal, hold, on, taken)
    finally:
        hold.close()
        taken.close()
        if hold.held_for is not None:
            metrics.HOLD_SECONDS.observe(hold.held_for)


def capture_process(
    name: str,
    process: Process,
    signal: int,
    hold: Hold,
    on: Conditions,
    taken: Taken | None = None,
) -> Recording:
    """Do all that needs a process that is held, then let it go; see `capture_crash`.

    Args:
        name: the crash ID.
        taken: what was read of it already.
    """
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
    known = facts.read_rest(recording.record.process, taken.proc, taken.resources)
    recording.facts = known
    recording.notes.extend(known.notes)
    head = taken.head or core_head.from_hold(hold)
    understand(recording, head)
    _explain_fault(recording)
    recording.code = taken.code
    if taken.memory is None:
        recording.code = facts.code_at_fault(known.task, head, known.maps)
    write_early(recording, on)
    found = modules.read(known.task, known.maps, on.module_files(), taken.take_files())
    recording.facts = replace(known, modules=found)
    keep_for_another(recording, recording.facts)
    taken.is_recorded()
    write_core(recording, hold, head, on, taken)
    recording.close_draft()
    hold.let_go()
    recording.held_for = hold.held_for


def _explain_fault(recording: Recording) -> None:
    """Look the fault address up in the mappings."""
    known, cause = recording.facts, recording.cause
    assert known is not None
    if cause.fault_address is not None and known.maps:
        recording.fault = fault_address.describe(known.maps, cause.fault_address)
