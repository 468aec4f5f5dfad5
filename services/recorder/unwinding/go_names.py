"""Names of functions in Go programs without symbols, by the table they have themselves."""

import os
import struct
from collections.abc import Sequence
from contextlib import suppress

import drgn

from services.recorder.unwinding.backtrace import ModuleFile
from services.recorder.unwinding.go_table import BadTable, Function, GoTable, Read

# The second, and relocated, where a program may lie anywhere.
_NAMES = (b".gopclntab", b".data.rel.ro.gopclntab")
# Since Go 1.26 its struct moduledata has a section. It begins with where the table is, and its word
# 22 is where the code is.
_MODULE_NAME, _MODULE = b".go.module", struct.Struct("<Q168xQ")
_MOST_SECTIONS = 4096
_LONGEST_NAMES = 256 * 1024  # bytes
_LARGEST = 1 << 30  # bytes of a table
# Elf64_Ehdr and Elf64_Shdr, elf(5)
_HEADER = struct.Struct("<16sHHI3QI6H")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_WIDE, _LITTLE = 2, 1  # ELFCLASS64, ELFDATA2LSB

Section = tuple[int, int, int]  # address, offset and size
Sections = dict[bytes, Section]


class GoNames:
    """Answers for one program; a table that is not there, or bad, is looked at once.

    Args:
        files: those that the process had mapped.
    """

    def __init__(self, program: drgn.Program, files: Sequence[ModuleFile]) -> None:
        self._program = program
        self._files = files
        self._tables: dict[int, GoTable | None] = {}
        self._known: dict[int, Function | None] = {}

    def find(self, pc: int) -> Function | None:
        """Return the function at an address, if a Go program says so."""
        if pc not in self._known:
            self._known[pc] = None
            with suppress(BadTable):
                table = self._table_of(pc)
                self._known[pc] = table.find(pc) if table else None
        return self._known[pc]

    def _table_of(self, pc: int) -> GoTable | None:
        file = next((one.file for one in self._files if one.start <= pc < one.end), -1)
        if file >= 0 and file not in self._tables:
            self._tables[file] = None
            with suppress(BadTable, LookupError, OSError):
                bias = self._program.module(pc).loaded_file_bias
                self._tables[file] = None if bias is None else self._opened(file, bias)
        return self._tables.get(file)

    def _opened(self, file: int, bias: int) -> GoTable | None:
        sections = _sections(file)
        for name in _NAMES:
            if name in sections:
                read = self._reader(file, bias, sections[name])
                return GoTable(read, self._text(file, bias, sections, bias + sections[name][0]))
        return None

    def _text(self, file: int, bias: int, sections: Sections, table: int) -> int | None:
        """Return the first address of Go's code, for tables that do not tell it."""
        if _MODULE_NAME in sections:
            raw = self._reader(file, bias, sections[_MODULE_NAME])(0, _MODULE.size)
            named, text = _MODULE.unpack(raw) if len(raw) == _MODULE.size else (0, 0)
            if named == table:
                return int(text)
        # Where the system's linker put it together, which brings .init, C code may come first.
        return None if b".init" in sections else bias + sections.get(b".text", (0, 0, 0))[0]

    def _reader(self, file: int, bias: int, section: Section) -> Read:
        address, offset, size = bias + section[0], section[1], min(section[2], _LARGEST)

        def read(at: int, wanted: int) -> bytes:
            wanted = min(wanted, size - at)
            if at < 0 or wanted <= 0:
                return b""
            # What was relocated is right in memory alone, and what was not is in no core.
            with suppress(drgn.FaultError, OverflowError, ValueError):
                return bytes(self._program.read(address + at, wanted))
            with suppress(OSError, OverflowError):
                return os.pread(file, wanted, offset + at)
            return b""

        return read


def _sections(file: int) -> Sections:
    """Return address, offset and size of each section by its name.

    Raises:
        BadTable: this is no such file.
    """
    try:
        header = _HEADER.unpack(os.pread(file, _HEADER.size, 0))
        ident, place, entry_size, count, names_at = header[0], header[6], *header[-3:]
        if ident[:6] != b"\x7fELF" + bytes((_WIDE, _LITTLE)) or entry_size != _SECTION.size:
            raise BadTable("no 64-bit ELF file with sections")
        raw = os.pread(file, min(count, _MOST_SECTIONS) * _SECTION.size, place)
        entries = list(_SECTION.iter_unpack(raw[: len(raw) // _SECTION.size * _SECTION.size]))
        _, _, _, _, at, size, *_ = entries[names_at]
        names = os.pread(file, min(size, _LONGEST_NAMES), at)
    except (OSError, OverflowError, struct.error, IndexError) as error:
        raise BadTable(f"sections cannot be read: {error}") from None
    found: Sections = {}
    for name, _, _, address, offset, size, *_ in entries:
        found.setdefault(names[name : name + 64].partition(b"\0")[0], (address, offset, size))
    return found
