"""Names of functions in Go programs without symbols, by the table they have themselves."""

import os
import struct
from collections.abc import Sequence
from contextlib import suppress

import drgn

from services.recorder.unwinding.backtrace import ModuleFile
from services.recorder.unwinding.go_table import BadTable, Function, GoTable, Read
from services.recorder.unwinding.module_files import file_of
from services.recorder.unwinding.sections import Section, Sections, sections_of

# The second, and relocated, where a program may lie anywhere.
_NAMES = (b".gopclntab", b".data.rel.ro.gopclntab")
# Since Go 1.26 its struct moduledata has a section. It begins with where the table is, and its word
# 22 is where the code is.
_MODULE_NAME, _MODULE = b".go.module", struct.Struct("<Q168xQ")
_LARGEST = 1 << 30  # bytes of a table


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
        try:
            module = self._program.module(pc)
        except LookupError:
            return None
        found = file_of(module, self._files)
        if found is None:
            return None
        if found.file not in self._tables:
            self._tables[found.file] = None
            with suppress(BadTable, OSError):
                bias = module.loaded_file_bias
                self._tables[found.file] = None if bias is None else self._opened(found.file, bias)
        return self._tables[found.file]

    def _opened(self, file: int, bias: int) -> GoTable | None:
        sections = sections_of(file)
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
