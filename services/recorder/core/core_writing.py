"""Where a crash's core goes: to its file in the spool, or straight to the bus."""

import os
from dataclasses import replace
from functools import partial

from crashbus.layout import Kind, crash_file_name
from services.common import crash_directory
from services.common import process as processes
from services.common.capture import CapturedFile
from services.common.core_stream import Announced
from services.recorder import facts, metrics
from services.recorder.conditions import Conditions
from services.recorder.core import core_bus, core_copy, core_filter, room, turns
from services.recorder.core.core_bus import NotSent
from services.recorder.core.core_head import Head
from services.recorder.core.core_memory import PagesUnreadable
from services.recorder.core.core_pages import Pages
from services.recorder.core.core_policy import Decision, Extent
from services.recorder.handover.hold import Hold
from services.recorder.recording import Recording, add_container, keep_record
from services.recorder.taker.taken import Taken

_LONGEST_HEAD = 8 * 1024 * 1024  # bytes of headers and notes that are kept in memory
_NO_DISK = 16 * 1024 * 1024  # bytes; with less room the stacks are kept in memory
_STACKS_IN_MEMORY = 4 * 1024 * 1024  # bytes
_COPIED_AT_ONCE = 1024 * 1024  # bytes
_NO_TURN = "too many large cores at once (CRASHBUS_RECORDER_CAPTURES)"
_BY_STREAM = "its memory comes by the kernel's stream"


def write_core(recording: Recording, hold: Hold, head: Head, on: Conditions, taken: Taken) -> None:
    """Keep the core of a process that is held, or was read while it was."""
    fault = _write(recording, hold, head, on, taken)
    _chain(recording, hold, on)
    if fault:
        hold.let_go(fault)


def _write(
    recording: Recording, hold: Hold, head: Head, on: Conditions, taken: Taken
) -> str | None:
    """Return why the process is let go before the end of its core, if it is."""
    assert recording.facts is not None
    if on.core_policy.asks_for_labels:
        add_container(recording)
    known = recording.facts
    decision = _decide(recording, known, on, taken)
    pages = _pages(recording, head, on, taken)
    if on.coredump_filter is not None and decision.extent is not Extent.NOTHING:
        pages = _filtered(recording, pages, on.coredump_filter)
        head = pages.head if pages is not None else head
    if taken.memory is not None or not _is_large(head):
        return _keep(recording, hold, head, pages, decision, on)
    if decision.extent is not Extent.ALL and pages is not None:
        return _keep(recording, hold, head, pages, decision, _without_turn(on))
    with on.turns.turn(recording.record.process, hold) as is_on:
        if not is_on and decision.extent is Extent.ALL:
            decision = Decision(Extent.STACKS, _NO_TURN)
        return _keep(recording, hold, head, pages, decision, on if is_on else _without_turn(on))


def _without_turn(on: Conditions) -> Conditions:
    """Return what holds for a large core that takes no turn.

    There are its stacks alone; but where its memory comes by the stream after all, which has no
    stacks alone, it is cut.
    """
    return replace(on, max_core_bytes=min(on.max_core_bytes or turns.LARGE, turns.LARGE))


def _is_large(head: Head) -> bool:
    return head.size is None or head.size > turns.LARGE


def _keep(
    recording: Recording,
    hold: Hold,
    head: Head,
    pages: Pages | None,
    decision: Decision,
    on: Conditions,
) -> str | None:
    if pages is not None and _goes_to_bus(recording, pages, decision, on):
        pages = _with_notes(pages, hold)
        try:
            return _to_bus(recording, hold, pages, decision, on)
        except NotSent as failure:
            decision = _without_bus(recording, decision, failure, on)
            if not hold.has_memory:
                return _keep_stacks(recording, pages.head, decision)
        _close_core(recording)
        head = pages.head
    return _to_disk(recording, hold, head, pages, decision, on)


def _decide(recording: Recording, known: facts.Facts, on: Conditions, taken: Taken) -> Decision:
    policy, line = on.core_policy, b""
    if policy.asks_for_arguments:
        line = processes.raw_command_line(known.task, taken.proc)
    return policy.decide(recording.record.process, known.username, known.maps, line)


def _chain(recording: Recording, hold: Hold, on: Conditions) -> None:
    """Hand the process on to who had core_pattern before; what is no core for us is none for it.

    Of a core that is on the bus it gets the stacks: nothing else of it is here.
    """
    if on.chain is None:
        return
    name, crash_id = crash_file_name(Kind.CORE, recording.epoch), recording.record.crash_id
    if name in recording.files:
        on.chain.add(crash_id, hold, recording.core_file)
    else:
        on.chain.skip(crash_id, "; ".join(recording.notes))


def _pages(recording: Recording, head: Head, on: Conditions, taken: Taken) -> Pages | None:
    """Say where the core's memory can be read; drop the mappings, which have megabytes."""
    known = recording.facts
    assert known is not None
    recording.facts = replace(known, maps=b"")
    taken.proc.forget(f"{known.task}/maps")
    if on.only_stream or head.fault is not None or not 0 < len(known.maps) < facts.MAX_MAPS:
        return None
    return Pages(known.task, head, known.maps, taken.memory)


def _filtered(recording: Recording, pages: Pages | None, mask: int) -> Pages | None:
    """Leave out kinds of memory, where that can be done: it is no reason to have no core."""
    try:
        if pages is None:
            raise PagesUnreadable(_BY_STREAM)
        return replace(pages, head=core_filter.narrowed(pages, mask))
    except PagesUnreadable as error:
        _say_nothing_is_left_out(recording, str(error))
        return pages


def _say_nothing_is_left_out(recording: Recording, because: str) -> None:
    name = crash_file_name(Kind.CORE, recording.epoch)
    recording.notes.append(f"{name}: CRASHBUS_RECORDER_COREDUMP_FILTER left nothing out: {because}")


def _to_disk(
    recording: Recording,
    hold: Hold,
    head: Head,
    pages: Pages | None,
    decision: Decision,
    on: Conditions,
) -> str | None:
    name = crash_file_name(Kind.CORE, recording.epoch)
    try:
        recording.core_file = _new_core(recording, decision.extent)
    except OSError as error:
        recording.notes.append(f"{name} could not be made: {error.strerror}")
        return None
    if decision.extent is Extent.NOTHING:
        recording.tell_left_out(decision.because, None)
    free = room.for_core(recording.core_file, on.disk_reserve)
    limit = min(on.max_core_bytes or free, free)
    copied = core_copy.copy(
        hold,
        head.raw,
        head.size,
        recording.core_file,
        limit,
        pages,
        decision.because,
        recording.tell_final,
        partial(_tell_left_out, recording, decision, head.size),
        room.Reserve(recording.core_file, on.disk_reserve).check,
    )
    if copied.streamed and head.sent is not None:
        _say_nothing_is_left_out(recording, _BY_STREAM)
    fault = copied.fault or (head.fault if head.cause is None else None)
    if fault is not None:
        _tell_left_out(recording, decision, head.size, fault)
    recording.tell_final(copied.size)
    if decision.extent is Extent.NOTHING:
        recording.notes.append(decision.because)
    else:
        _note_core(recording, head, CapturedFile(size=copied.size, in_order=copied.in_order), fault)
    metrics.CORE_BYTES.inc(copied.size)
    wants_all = decision.extent is Extent.ALL
    lacked = copied.disk_full or (wants_all and fault is not None and (head.size or 0) > free)
    on.on_want_of_room((head.size or 1) if lacked else 0)
    return copied.fault


def _tell_left_out(
    recording: Recording, decision: Decision, expected: int | None, why: str
) -> None:
    """Keep why the core has less than the kernel's, for the recorder that finishes the set."""
    if decision.extent is not Extent.NOTHING:  # which was told
        recording.tell_left_out(why, expected)


def _note_core(recording: Recording, head: Head, core: CapturedFile, fault: str | None) -> None:
    recording.core_size = core.size
    told = {
        "truncated": fault is not None,
        "expected": head.size if fault else None,
        "note": fault,
    }
    name = crash_file_name(Kind.CORE, recording.epoch)
    recording.files[name] = core.model_copy(update=told)


def _new_core(recording: Recording, extent: Extent) -> int:
    """Make the file of a core; one that is not to be kept has no name."""
    if extent is not Extent.NOTHING:
        return crash_directory.create_file(recording.directory, Kind.CORE, recording.epoch)
    name, descriptor = crash_directory.hidden_file(Kind.CORE, recording.directory)
    os.unlink(name, dir_fd=recording.directory)
    return descriptor


def _goes_to_bus(recording: Recording, pages: Pages, decision: Decision, on: Conditions) -> bool:
    way, size = on.bus_way, pages.head.size
    if way is None or decision.extent is Extent.NOTHING or size is None:
        return False
    if pages.head.data > _LONGEST_HEAD:
        return False
    if way.always:
        return True
    free = room.for_new_core(recording.directory, on.disk_reserve)
    wanted = min(size, on.max_core_bytes or size)
    return decision.extent is Extent.ALL and wanted > free and _touched(pages) > free


def _touched(pages: Pages) -> int:
    """Return how many bytes a core has that holds what was touched alone; 0: it can't be told."""
    head = pages.head
    try:
        with pages.opened() as (_, found):
            memory = sum(load.size for load in found.runs(head.loads()))
    except PagesUnreadable:
        return 0
    return head.data + 2 * head.table_size + memory


def _with_notes(pages: Pages, hold: Hold) -> Pages:
    """Take all from the stream that comes before the memory."""
    head = pages.head
    missing = head.data - len(head.raw)
    if missing <= 0:
        return pages
    rest = core_copy.read_exactly(hold, missing)
    return replace(pages, head=replace(head, raw=head.raw + rest))


def _to_bus(
    recording: Recording, hold: Hold, pages: Pages, decision: Decision, on: Conditions
) -> str | None:
    """Hand the core over, and keep its stacks, for the backtrace, where nobody sees them.

    Raises:
        NotSent: the bus does not have it.
    """
    head, way = pages.head, on.bus_way
    assert way is not None
    if len(head.raw) < head.data:
        raise NotSent("its notes ended early")
    _read_stacks(recording, hold, pages)
    process = recording.record.process
    name = crash_file_name(Kind.CORE, recording.epoch)
    _keep_word(recording, f"{name} was on its way to the bus when the recorder ended")
    sent = core_bus.send(
        hold,
        way,
        Announced(crash_id=recording.record.crash_id, directory=str(process.pid), name=name),
        pages,
        recording.core_file,
        on.max_core_bytes or core_copy.LARGEST,
        stacks_only=decision.extent is Extent.STACKS,
    )
    size = sent.file.size
    fault = core_copy.left_out(sent.missing, on.max_core_bytes, decision.because)
    if size < sent.size:
        fault = f"{sent.size - size} of {sent.size} bytes are missing: the process was killed"
    _note_core(recording, head, CapturedFile(size=size, sent=sent.file), fault)
    # Should the recorder end before all is done, the collector knows what the bus has.
    recording.record = recording.record.model_copy(update={"files": recording.files})
    if not _keep_word(recording):
        del recording.files[name]
        raise NotSent("its record could not be kept")
    metrics.CORE_BYTES.inc(size)
    metrics.TO_BUS.labels("sent").inc()
    on.on_want_of_room(0)
    return fault


def _keep_word(recording: Recording, *notes: str) -> bool:
    """Keep in the record what is true if nothing more can be told; tell whether it is kept."""
    recording.record = recording.record.model_copy(update={"notes": notes})
    return keep_record(recording)


def _read_stacks(recording: Recording, hold: Hold, pages: Pages) -> None:
    """Keep headers, notes and the threads' stacks in a file without a name."""
    free = room.for_new_core(recording.directory, 0)
    try:
        if free < _NO_DISK:
            recording.core_file = os.memfd_create("stacks", os.MFD_CLOEXEC)
            free = _STACKS_IN_MEMORY
        else:
            recording.core_file = _new_core(recording, Extent.NOTHING)
        core_copy.copy_stacks(hold, pages, recording.core_file, free)
    except (PagesUnreadable, OSError) as error:
        raise NotSent(f"its stacks could not be kept: {error}") from error


def _without_bus(
    recording: Recording, decision: Decision, failure: NotSent, on: Conditions
) -> Decision:
    """Say that the bus did not take a core, and what may be on disk instead."""
    metrics.TO_BUS.labels("failed").inc()
    because = f"the bus did not take it: {failure}"
    _keep_word(recording)
    if on.bus_way is not None and on.bus_way.always:
        return Decision(Extent.STACKS, decision.because or because)
    recording.notes.append(f"{crash_file_name(Kind.CORE, recording.epoch)}: {because}")
    return decision


def _keep_stacks(recording: Recording, head: Head, decision: Decision) -> str:
    """Keep as the core what was read of a process that is gone."""
    name = crash_file_name(Kind.CORE, recording.epoch)
    size = 0
    try:
        core = crash_directory.create_file(recording.directory, Kind.CORE, recording.epoch)
        try:
            while size < os.fstat(recording.core_file).st_size:
                size += os.sendfile(core, recording.core_file, size, _COPIED_AT_ONCE)
        finally:
            os.close(core)
    except OSError as error:
        recording.notes.append(f"{name} could not be written: {error.strerror}")
    fault = f"only the stacks were kept: {decision.because or 'the process is gone'}"
    _note_core(recording, head, CapturedFile(size=size), fault)
    return fault


def _close_core(recording: Recording) -> None:
    if recording.core_file >= 0:
        os.close(recording.core_file)
        recording.core_file = -1
