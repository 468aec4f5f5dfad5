"""The sections of 64-bit ELF files: elf(5). Files may be hostile: what is read is bounded."""

import os
import struct

_MOST = 4096
_LONGEST_NAMES = 256 * 1024  # bytes
# Elf64_Ehdr and Elf64_Shdr
_HEADER = struct.Struct("<16sHHI3QI6H")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_WIDE, _LITTLE = 2, 1  # ELFCLASS64, ELFDATA2LSB

Section = tuple[int, int, int]  # address, offset and size
Sections = dict[bytes, Section]


def sections_of(file: int) -> Sections:
    """Return the sections of a file by name; none of what is no such file.

    Args:
        file: descriptor; its position stays as it is.
    """
    try:
        return _sections(file)
    except (OSError, OverflowError, struct.error, IndexError):
        return {}


def _sections(file: int) -> Sections:
    header = _HEADER.unpack(os.pread(file, _HEADER.size, 0))
    ident, place, entry_size, count, names_at = header[0], header[6], *header[-3:]
    if ident[:6] != b"\x7fELF" + bytes((_WIDE, _LITTLE)) or entry_size != _SECTION.size:
        return {}
    raw = os.pread(file, min(count, _MOST) * _SECTION.size, place)
    entries = list(_SECTION.iter_unpack(raw[: len(raw) // _SECTION.size * _SECTION.size]))
    _, _, _, _, at, size, *_ = entries[names_at]
    names = os.pread(file, min(size, _LONGEST_NAMES), at)
    found: Sections = {}
    for name, _, _, address, offset, size, *_ in entries:
        found.setdefault(names[name : name + 64].partition(b"\0")[0], (address, offset, size))
    return found
