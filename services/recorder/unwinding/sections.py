"""The sections of little-endian ELF files: elf(5).

Files may be hostile: what is read is bounded.
"""

import os
import struct

_MOST = 4096
_LONGEST_NAMES = 256 * 1024  # bytes
_LITTLE = 1  # ELFDATA2LSB
# ElfXX_Ehdr and ElfXX_Shdr by ELFCLASS
_FORMS = {
    1: (struct.Struct("<16sHHI3II6H"), struct.Struct("<10I")),
    2: (struct.Struct("<16sHHI3QI6H"), struct.Struct("<IIQQQQIIQQ")),
}

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
    ident = os.pread(file, 16, 0)
    if ident[:4] != b"\x7fELF" or ident[4] not in _FORMS or ident[5] != _LITTLE:
        return {}
    head, section = _FORMS[ident[4]]
    header = head.unpack(os.pread(file, head.size, 0))
    place, entry_size, count, names_at = header[6], *header[-3:]
    if entry_size != section.size:
        return {}
    raw = os.pread(file, min(count, _MOST) * section.size, place)
    entries = list(section.iter_unpack(raw[: len(raw) // section.size * section.size]))
    _, _, _, _, at, size, *_ = entries[names_at]
    names = os.pread(file, min(size, _LONGEST_NAMES), at)
    found: Sections = {}
    for name, _, _, address, offset, size, *_ in entries:
        found.setdefault(names[name : name + 64].partition(b"\0")[0], (address, offset, size))
    return found
