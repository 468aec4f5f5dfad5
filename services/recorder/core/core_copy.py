"""Copying a core to its file, in constant memory, as far as it goes.

Headers and notes come from the kernel's stream. So does the memory where it must; else its
pages are read from the process itself, which takes a fraction of the time. Memory that was
never touched is zeros; in the file it becomes holes.
"""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import structlog

from services.recorder import metrics
from services.recorder.core import core_pages, core_reduced, sparse
from services.recorder.core.core_head import Head
from services.recorder.core.core_memory import Found, Memory, PagesUnreadable, Piece
from services.recorder.core.core_pages import Pages, TellFinal
from services.recorder.core.core_reduced import Reduced
from services.recorder.handover.hold import Hold, Stalled

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LARGEST = 8 * 1024**4  # bytes; ext4 has files of 16 TiB at most
BLOCK = 1024 * 1024  # bytes read before anything is written
# What a core gives back on a full disk, so that the small files find room.
GIVEN_BACK = 4 * 1024 * 1024
_LONG = 64 * 1024 * 1024  # bytes; smaller cores are copied in some ms
_MOST_STACKS = 64
_FIRST = 8 * 1024 * 1024  # bytes
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


TellLeftOut = Callable[[str], None]
CheckRoom = Callable[[int], None]


def _tell_nobody(_: object) -> None:
    pass


@dataclass(frozen=True)
class Copied:
    """How far a copy got.

    Attributes:
        size: of the file in bytes.
        fault: why it is cut short; None when it is whole.
        disk_full: there was no room for more.
        in_order: what was said to be final is so, `services.common.unfinished`.
        streamed: its memory is all that the kernel's stream has.
    """

    size: int
    fault: str | None = None
    disk_full: bool = False
    in_order: bool = False
    streamed: bool = False


def copy(
    hold: Hold,
    head: bytes,
    announced: int | None,
    core: int,
    limit: int,
    pages: Pages | None = None,
    stacks_because: str = "",
    tell_final: TellFinal = _tell_nobody,
    tell_left_out: TellLeftOut = _tell_nobody,
    check_room: CheckRoom = _tell_nobody,
) -> Copied:
    """Write head and the rest of the core to an empty file.

    Args:
        announced: the size that the head tells, in bytes.
        core: the file's descriptor.
        limit: bytes that it may have; 0: any number.
        pages: the process's own. Without them a core over the limit is cut at its end, else
            it is laid out anew, `core_reduced`.
        stacks_because: why to keep only the threads' stacks and what is needed to read them,
            where there are pages; empty: keep all.
        tell_final: told from time to time up to where a core of pages is copied.
        tell_left_out: told, before it is copied, why it has less than all; empty: it has all.
        check_room: told from time to time how many bytes it has, and raises an OSError where it
            shall have no more.
    """
    try:
        size = sparse.write(core, head[: limit or None], 0)
        if pages is not None and announced and pages.start <= (limit or announced):
            size, fault = _stream(hold, core, size, pages.start, check_room)
            if size == pages.start:
                copied = _from_memory(
                    *(hold, pages, core, announced, limit),
                    *(stacks_because, tell_final, tell_left_out, check_room),
                )
                if copied is not None:
                    return copied
                announced, pages = pages.head.as_sent().size, None
        size, fault = _stream(hold, core, size, limit, check_room)
        os.ftruncate(core, size)
    except OSError as error:
        copied = _cut_back(core, error)
        if copied.disk_full and pages is not None and pages.start < copied.size:
            return _stacks_instead(hold, pages, core, copied, tell_final, tell_left_out)
        return copied
    if limit and size >= limit and (announced is None or announced > limit):
        return Copied(size, f"cut at the limit of {limit} bytes", streamed=True)
    if announced is not None and size < announced:
        missing = f"{announced - size} of {announced} bytes are missing"
        return Copied(size, f"{missing}: {fault or _ended(hold)}", streamed=True)
    return Copied(size, fault or _let_go(hold), streamed=True)


def copy_stacks(hold: Hold, pages: Pages, core: int, limit: int) -> None:
    """Write headers, notes and the threads' stacks alone to an empty file.

    Args:
        pages: with a head that has all bytes before the memory.
        limit: bytes that the file may have.

    Raises:
        PagesUnreadable: they cannot be read.
        OSError: they cannot be written.
    """
    sparse.write(core, pages.head.raw, 0)
    with pages.opened() as (memory, touched):
        reduced = core_reduced.plan(pages.head, core, touched, limit, stacks_only=True)
        _reduced(hold, memory, touched, core, reduced)


def read_exactly(hold: Hold, size: int) -> bytes:
    """Return the next bytes of the stream; fewer only at its end, or when it stalls."""
    data = bytearray(size)
    got, _ = _fill(hold, memoryview(data))
    return bytes(data[:got])


def _stream(
    hold: Hold, core: int, size: int, limit: int, check_room: CheckRoom
) -> tuple[int, str | None]:
    """Write from the stream on at `size`, up to `limit` (0: none); return where it ended."""
    block, fault = bytearray(BLOCK), None
    while not (limit and size >= limit):
        wanted = min(BLOCK, limit - size) if limit else BLOCK
        got, fault = _fill(hold, memoryview(block)[:wanted])
        size += sparse.write(core, block if got == BLOCK else block[:got], size)
        if got < wanted:
            break
        check_room(size)
    return size, fault


def _from_memory(
    hold: Hold,
    pages: Pages,
    core: int,
    announced: int,
    limit: int,
    stacks_because: str,
    tell_final: TellFinal,
    tell_left_out: TellLeftOut,
    check_room: CheckRoom,
) -> Copied | None:
    """Copy the process's pages; None where the kernel must be asked for them after all."""
    try:
        with pages.opened() as (memory, touched):
            if stacks_because or announced > (limit or LARGEST):
                reduced = core_reduced.plan(
                    pages.head, core, touched, limit or LARGEST, bool(stacks_because)
                )
                missing = left_out(reduced.missing, limit, stacks_because)
                tell_left_out(missing or "")
                copied = _reduced(hold, memory, touched, core, reduced, tell_final, check_room)
                if copied.fault is None:
                    copied = Copied(copied.size, missing)
            else:
                found = touched.pieces(pages.head.loads())
                first = _for_backtrace(pages.head, core, touched, announced)
                end = core_pages.copy(
                    hold, memory, found, core, announced, tell_final, first, check_room
                )
                copied = _cut(hold, core, end, announced)
    except PagesUnreadable as error:
        metrics.CORES.labels("stream").inc()
        log.info("the core's memory comes by the kernel's stream", because=str(error))
        tell_left_out("")
        os.ftruncate(core, pages.start)
        sparse.write(core, pages.head.as_sent().raw, 0)
        return None
    metrics.CORES.labels("memory").inc()
    return replace(copied, in_order=True)


def _stacks_instead(
    hold: Hold,
    pages: Pages,
    core: int,
    copied: Copied,
    tell_final: TellFinal,
    tell_left_out: TellLeftOut,
) -> Copied:
    """Keep the stacks in the room that a core had when there was no more: they lie at its end."""
    fault = f"only the stacks were kept: {copied.fault}"
    try:
        with pages.opened() as (memory, touched):
            if not hold.has_memory or memory.is_gone():
                return copied
            reduced = core_reduced.plan(pages.head, core, touched, copied.size, stacks_only=True)
            tell_left_out(fault)
            tell_final(pages.start)
            os.ftruncate(core, pages.start)
            try:
                stacks = _reduced(hold, memory, touched, core, reduced, tell_final)
            except PagesUnreadable as error:  # what was to be stacks would seem to be zeros
                os.ftruncate(core, pages.start)
                sparse.write(core, pages.head.raw, 0)
                stacks = Copied(pages.start, f"{copied.fault}, and no stacks: {error}")
    except PagesUnreadable:  # what there is stays
        return copied
    except OSError as error:
        return _cut_back(core, error)
    return replace(stacks, fault=stacks.fault or fault, disk_full=True)


def left_out(missing: int, limit: int, stacks_because: str) -> str | None:
    """Say what a core that was laid out anew does not hold; None: only what was never touched.

    Args:
        missing: bytes of touched memory.
        limit: bytes that it may have.
    """
    if stacks_because:
        return f"only the stacks were kept: {stacks_because}"
    if not missing:
        return None
    return (
        f"{missing} bytes of memory were left out, the largest mappings first: it may "
        f"have {limit} bytes"
    )


def _for_backtrace(head: Head, core: int, touched: Found, announced: int) -> Iterator[Piece]:
    """Give what a backtrace needs, if the whole takes so long that somebody may end us meanwhile.

    Most of it lies at the end.
    """
    if announced < _LONG:
        return iter(())
    needed = core_reduced.stacks_and_small(head, core, touched, _MOST_STACKS, _FIRST)
    return touched.pieces(needed)


def _reduced(
    hold: Hold,
    memory: Memory,
    touched: Found,
    core: int,
    reduced: Reduced,
    tell_final: TellFinal = _tell_nobody,
    check_room: CheckRoom = _tell_nobody,
) -> Copied:
    for offset, raw in reduced.headers.items():
        sparse.write(core, raw, offset)
    found = touched.pieces(iter(reduced.loads))
    end = core_pages.copy(
        hold, memory, found, core, reduced.size, tell_final, check_room=check_room
    )
    return _cut(hold, core, end, reduced.size)


def _cut(hold: Hold, core: int, end: int, size: int) -> Copied:
    if end == size:
        return Copied(end)
    os.ftruncate(core, end)
    return Copied(end, f"{size - end} of {size} bytes are missing: {_ended(hold)}")


def _ended(hold: Hold) -> str:
    return _let_go(hold) or "the process was killed while it dumped"


def _let_go(hold: Hold) -> str | None:
    if hold.is_held:
        return None
    return f"the recorder let it go: {hold.let_go_because or 'before the end'}"


def _fill(hold: Hold, block: memoryview) -> tuple[int, str | None]:
    """Fill a block from the stream; less comes only at its end, with the fault if it is one."""
    got = 0
    try:
        while got < len(block) and (more := hold.read_into(block[got:])):
            got += more
    except (Stalled, OSError) as error:
        return got, str(error)
    return got, None


def _cut_back(core: int, error: OSError) -> Copied:
    full = error.errno in _FULL
    size = os.fstat(core).st_size
    if full:
        size = max(0, size - GIVEN_BACK) // 4096 * 4096
        os.ftruncate(core, size)
    why = "no room on disk" if full else f"the file could not be written: {error.strerror}"
    return Copied(size, why, disk_full=full)
