"""The build ID of an ELF file, as the linker wrote it: elf(5), NT_GNU_BUILD_ID.

Files may be hostile: what is read is bounded, and a file that is not right has no build ID.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from itertools import islice

_MAGIC = b"\x7fELF"
_MAX_HEADERS = 128  # program headers; binaries have about a dozen
_MAX_NOTES, _MAX_NOTE_BYTES = 64, 64 * 1024  # of a file; binaries have about five
_PT_NOTE, _NT_GNU_BUILD_ID = 4, 3
_MIN_ID, _MAX_ID = 2, 64  # bytes


def build_id(file: int) -> str | None:
    """Return a file's build ID as 4 to 128 hexadecimal digits; None where it has none.

    Args:
        file: descriptor; its position stays as it is.
    """
    try:
        return _build_id(file)
    except (struct.error, OSError, OverflowError):
        return None


def is_elf(file: int) -> bool:
    """Tell whether a file begins like a program or library."""
    try:
        return os.pread(file, len(_MAGIC), 0) == _MAGIC
    except OSError:
        return False


def _build_id(file: int) -> str | None:
    ident = os.pread(file, 64, 0)
    if len(ident) < 64 or ident[:4] != _MAGIC or ident[4] not in (1, 2) or ident[5] not in (1, 2):
        return None
    wide, order = ident[4] == 2, "<" if ident[5] == 1 else ">"
    (table,) = struct.unpack_from(order + ("Q" if wide else "I"), ident, 32 if wide else 28)
    size, count = struct.unpack_from(order + "HH", ident, 54 if wide else 42)
    if size != (56 if wide else 32):
        return None
    headers = os.pread(file, min(count, _MAX_HEADERS) * size, table)
    whole = range(0, len(headers) - size + 1, size)
    segments = (_segment(headers[at : at + size], order, wide) for at in whole)
    notes, left = [], _MAX_NOTE_BYTES
    for kind, offset, length in segments:
        if kind == _PT_NOTE and left:
            notes.append(os.pread(file, min(length, left), offset))
            left -= len(notes[-1])
    return noted(notes, order)


def noted(segments: Iterable[bytes], order: str = "<") -> str | None:
    """Return the build ID that is among notes; None where there is none.

    Args:
        order: of bytes, as `struct` has it.
    """
    notes = (note for segment in segments for note in _notes(segment, order))
    return next(filter(None, islice(notes, _MAX_NOTES)), None)


def _segment(header: bytes, order: str, wide: bool) -> tuple[int, int, int]:
    """Return p_type, p_offset and p_filesz."""
    if wide:
        kind, _, offset, _, _, length = struct.unpack_from(order + "IIQQQQ", header)
    else:
        kind, offset, _, _, length = struct.unpack_from(order + "IIIII", header)
    return kind, offset, length


def _notes(notes: bytes, order: str) -> Iterator[str | None]:
    """Give the build ID that each note is, or None."""
    place = 0
    while place + 12 <= len(notes):
        name, size, kind = struct.unpack_from(order + "III", notes, place)
        start = place + 12 + (name + 3) // 4 * 4
        body = notes[start : start + size]
        is_gnu = notes[place + 12 : place + 12 + name] == b"GNU\0"
        is_whole = _MIN_ID <= len(body) == size <= _MAX_ID
        yield body.hex() if is_gnu and is_whole and kind == _NT_GNU_BUILD_ID else None
        place = start + (size + 3) // 4 * 4
