"""A core that is smaller than the kernel's, and that a debugger opens all the same.

When a core may not be as large as the kernel would make it, its file is laid out anew. The
kernel's headers and notes stay where they are, a new table of program headers follows, then
the memory that is kept: pages that were touched, the stack of each thread first, then mapping
after mapping, the smallest first. What is left out has a program header without content
(p_filesz 0, elf(5)), so that a debugger says that it is not there instead of showing zeros.
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

from services.recorder.core import core_threads
from services.recorder.core.core_head import Head, Load
from services.recorder.core.core_memory import PAGE, Found, PagesUnreadable

STACK = 256 * 1024  # bytes kept of each stack, from its stack pointer on
# Bytes of a mapping that is kept with stacks alone: without the pages that tell where libraries
# are (ELF headers, the loader's list of them) there are only addresses.
SMALL = 64 * 1024
_RED_ZONE = 128  # bytes below the stack pointer that a function may use, x86-64 psABI
MAX_SEGMENTS = 30_000  # a table without extended numbering has 65,534 entries
_NEAR = 64 * 1024  # bytes between two runs of pages for which a further entry does not pay
_LAST = 1 << 64

# Offset of the stack pointer in struct elf_prstatus, by e_machine: i386, x86-64, AArch64.
_STACK_POINTER = {3: (132, "I"), 62: (264, "Q"), 183: (360, "Q")}


@dataclass(frozen=True)
class Reduced:
    """How the smaller core is laid out.

    Attributes:
        loads: the memory it holds, with its place in the file.
        size: of the file in bytes.
        missing: bytes of touched memory that it does not hold.
        headers: what to write first: bytes by offset.
    """

    loads: list[Load]
    size: int
    missing: int
    headers: dict[int, bytes]


def plan(head: Head, core: int, touched: Found, limit: int, stacks_only: bool) -> Reduced:
    """Choose what a core of at most `limit` bytes holds.

    Args:
        core: its file, with the kernel's headers and notes.

    Raises:
        PagesUnreadable: it cannot be laid out anew.
    """
    table_room = (head.table_size + 2 * MAX_SEGMENTS * head.entry_size) // PAGE * PAGE
    room = limit - head.data - min(table_room, limit // 16)
    if room <= 0:
        raise PagesUnreadable(f"its notes leave no room within {limit} bytes")
    if stacks_only:
        chosen, missing = list(stacks_and_small(head, core, touched, None, room)), 0
    else:
        stacks = list(_stacks(head, core, touched))
        total = sum(load.size for load in touched.runs(head.loads()))
        everything = _joined(touched.runs(head.loads()))
        by_size = sorted(head.loads(), key=lambda load: load.size)
        if total > room:
            everything = _chain(stacks, _joined(touched.runs(iter(by_size))))
        chosen = _first_of(everything, room)
        missing = max(0, total - sum(end - start for start, end in _merged(chosen)))
    return _lay_out(head, _merged(chosen), missing)


def stacks_and_small(
    head: Head, core: int, touched: Found, most: int | None, room: int
) -> Iterator[Load]:
    """Give what of a core is needed for a backtrace: the stacks, then each small mapping.

    What the process may not read itself is no part of it, and the kernel may refuse it to us, too:
    then there would be no stacks either.

    Args:
        core: its file, with the kernel's headers and notes.
        most: threads whose stacks are given; None: all.
        room: bytes to give at most.

    Raises:
        PagesUnreadable: it cannot be told.
    """
    small = (load for load in head.loads() if load.size <= SMALL)
    stacks = list(_stacks(head, core, touched, most))
    needed = _chain(stacks, touched.runs(small))
    yield from _first_of((run for run in needed if touched.is_readable(run)), room)


def _chain(first: list[Load], then: Iterator[Load]) -> Iterator[Load]:
    yield from first
    yield from then


def _first_of(runs: Iterator[Load], room: int) -> list[Load]:
    chosen: list[Load] = []
    for run in runs:
        if room < PAGE or len(chosen) == MAX_SEGMENTS:
            break
        size = min(run.size, room // PAGE * PAGE)
        chosen.append(run._replace(size=size))
        room -= size
    return chosen


def _joined(runs: Iterator[Load]) -> Iterator[Load]:
    """Join runs that are near each other and of the same mapping, which `offset` tells."""
    last: Load | None = None
    for run in runs:
        if last is not None and last.offset - last.address == run.offset - run.address:
            gap = run.address - (last.address + last.size)
            if 0 <= gap <= _NEAR:
                last = last._replace(size=last.size + gap + run.size)
                continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def _stacks(head: Head, core: int, touched: Found, most: int | None = None) -> Iterator[Load]:
    """Give the touched pages of each thread's stack, the crashing thread's first.

    Args:
        most: threads whose stacks are given; None: all.

    Raises:
        PagesUnreadable: the notes end early.
    """
    loads = sorted(head.loads())
    for pointer in islice(stack_pointers(head, core), most):
        place = bisect_right(loads, pointer, key=lambda load: load.address) - 1
        if place < 0 or pointer >= loads[place].address + loads[place].size:
            continue
        load = loads[place]
        start = max((pointer - _RED_ZONE) // PAGE * PAGE, load.address)
        size = min(STACK, load.address + load.size - start)
        part = Load(start, load.offset + start - load.address, size)
        yield from touched.runs(iter([part]))


def stack_pointers(head: Head, core: int) -> Iterator[int]:
    """Give the stack pointer of each thread, the crashing one's first."""
    (machine,) = struct.unpack_from(head.order + "H", head.raw, 18)
    if machine not in _STACK_POINTER:
        return
    offset, form = _STACK_POINTER[machine]
    for note in core_threads.prstatuses(head, core):
        if len(note) >= offset + 8:
            yield struct.unpack_from(head.order + form, note, offset)[0]


def _merged(chosen: list[Load]) -> list[tuple[int, int]]:
    """Return start and end address of what was chosen, sorted, without overlaps."""
    merged: list[tuple[int, int]] = []
    for load in sorted(chosen):
        end = load.address + load.size
        if merged and load.address <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((load.address, end))
    return merged


def _lay_out(head: Head, ranges: list[tuple[int, int]], missing: int) -> Reduced:
    entries = list(_entries(head, ranges))
    if len(entries) >= 0xFFFF:
        raise PagesUnreadable(f"it would have {len(entries)} segments")
    table, loads = bytearray(), []
    place = _up(head.data + len(entries) * head.entry_size)
    for entry in entries:
        if entry.has_content:
            loads.append(Load(entry.address, place, entry.size))
            table += head.entry(entry.raw, entry.address, place, entry.size, entry.size)
            place += entry.size
        elif entry.size:
            table += head.entry(entry.raw, entry.address, place, 0, entry.size)
        else:
            table += entry.raw
    header = head.with_table(head.data, len(entries))
    return Reduced(loads, place, missing, {0: header, head.data: bytes(table)})


@dataclass(frozen=True)
class _Entry:
    """A program header to write; without a size it stays as it was."""

    raw: bytes
    address: int = 0
    size: int = 0
    has_content: bool = False


def _entries(head: Head, ranges: list[tuple[int, int]]) -> Iterator[_Entry]:
    """Cut the kernel's segments where the ranges begin and end."""
    cuts = sorted({address for one in ranges for address in one})
    for raw, load, memory in head.segments():
        if load is None or not memory:
            yield _Entry(raw)
            continue
        end = load.address + memory
        between = cuts[bisect_right(cuts, load.address) : bisect_left(cuts, end)]
        for start, stop in pairwise([load.address, *between, end]):
            kept = load.size > 0 and _covers(ranges, start)
            yield _Entry(raw, start, stop - start, kept)


def _covers(ranges: list[tuple[int, int]], address: int) -> bool:
    place = bisect_right(ranges, (address, _LAST)) - 1
    return place >= 0 and address < ranges[place][1]


def _up(size: int) -> int:
    return -(-size // PAGE) * PAGE
