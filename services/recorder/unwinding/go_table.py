"""The table that a Go program carries for its own tracebacks; stripping leaves it there.

Its forms are those of Go 1.16, 1.18 and 1.20, in Go's src/runtime/symtab.go and
src/debug/gosym/pclntab.go; of 64-bit little-endian machines alone. All of it is the crashed
process's to forge, so each step is bounded, and nothing is believed but that bytes are bytes.
"""

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.recorder.unwinding.backtrace import MAX_TEXT

Read = Callable[[int, int], bytes]

_MOST_FUNCTIONS = 1 << 24
_LONGEST_LINES = 16 * 1024  # bytes of the table of one function's files or lines
_STEPS = 500_000  # through all such tables, about a second
_NONE = 0xFFFFFFFF  # as a 32-bit number: -1


class BadTable(Exception):
    """This is no such table, or it does not say what is asked."""


@dataclass(frozen=True)
class Function:
    """The function at an address.

    Attributes:
        entry: its first address, as the process saw it.
        source: ``file:line``, if that can be told.
        stack: bytes from the stack pointer to the return address, if they can be told.
    """

    name: str
    entry: int
    source: str | None
    stack: int | None


@dataclass(frozen=True)
class _Form:
    """What differs between versions.

    Attributes:
        first: word of the header that is the first of five offsets.
        width: bytes of a number in the list of functions, and of the first in a function's data.
    """

    first: int
    width: int


_FORMS = {0xFFFFFFFA: _Form(2, 8), 0xFFFFFFF0: _Form(3, 4), 0xFFFFFFF1: _Form(3, 4)}
_HEAD = struct.Struct("<IHBB8Q")


class GoTable:
    """Answers what is at an address.

    Args:
        read: gives bytes of the table by offset and size, fewer or none where there are no more.
        text: first address of the code, for tables that do not tell it; None: it is not known.

    Raises:
        BadTable: this is none that is known, or it cannot be told where the code is.
    """

    def __init__(self, read: Read, text: int | None) -> None:
        self._read = read
        self._steps = _STEPS
        magic, padding, self._quantum, pointer, count, _, *words = _HEAD.unpack(
            self._bytes(0, _HEAD.size)
        )
        form = _FORMS.get(magic)
        if form is None or padding or self._quantum not in (1, 2, 4) or pointer != 8:
            raise BadTable("not the beginning of a table that is known")
        self._width = form.width
        offsets = words[form.first - 2 : form.first + 3]
        self._names, self._units, self._files, self._numbers, self._functions = offsets
        self._count = min(count, _MOST_FUNCTIONS)
        # Go 1.16 has whole addresses, and no longer tells from 1.26 on.
        begin = 0 if form.width == 8 else words[0] or text
        if begin is None:
            raise BadTable("it does not tell where the code is")
        self._text = begin

    def find(self, pc: int) -> Function | None:
        """Return the function at an address; None where none is.

        Raises:
            BadTable: it cannot be told.
        """
        position = bisect_right(range(self._count), pc, key=self._entry) - 1
        if position < 0 or pc >= self._entry(self._count):
            return None
        entry, width = self._entry(position), self._width
        data = self._functions + self._number(self._functions + (2 * position + 1) * width, width)
        name = self._text_at(self._names + self._number(data + width))
        if not name:
            return None
        stack, files, lines, unit = (self._number(data + width + at) for at in (12, 16, 20, 28))
        source = self._source(pc - entry, files, lines, unit)
        return Function(name, entry, source, self._value(stack, pc - entry))

    def _entry(self, position: int) -> int:
        """Return a function's first address; of the one behind the last, where all end."""
        return self._text + self._number(self._functions + 2 * position * self._width, self._width)

    def _source(self, offset: int, files: int, lines: int, unit: int) -> str | None:
        file, line = self._value(files, offset), self._value(lines, offset)
        if file is None or line is None or file < 0 or line < 0:
            return None
        try:
            place = self._number(self._units + 4 * (unit + file))
            name = None if place == _NONE else self._text_at(self._files + place)
        except BadTable:
            return None
        return f"{name}:{line}" if name else None

    def _value(self, table: int, offset: int) -> int | None:
        """Return what a table of a function says of an offset in it, in bytes.

        It is a list of pairs: by how much the value changes, and for how many bytes it holds.
        """
        value, end = -1, 0
        numbers = _varints(self._read(self._numbers + table, _LONGEST_LINES) if table else b"")
        for change, held in zip(numbers, numbers, strict=False):
            self._steps -= 1
            if (not change and end) or self._steps <= 0:
                return None
            value += -(change >> 1) - 1 if change & 1 else change >> 1
            end += held * self._quantum
            if offset < end:
                return value
        return None

    def _text_at(self, offset: int) -> str:
        raw = self._read(offset, MAX_TEXT).partition(b"\0")[0]
        return raw.decode("utf-8", "backslashreplace")

    def _number(self, offset: int, width: int = 4) -> int:
        return int.from_bytes(self._bytes(offset, width), "little")

    def _bytes(self, offset: int, size: int) -> bytes:
        raw = self._read(offset, size)
        if len(raw) != size:
            raise BadTable("it ends too soon")
        return raw


def _varints(raw: bytes) -> Iterator[int]:
    """Give numbers of 7 bits a byte, the lowest first, up to 32 bits."""
    number, shift = 0, 0
    for byte in raw:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number & _NONE
            number, shift = 0, 0
        elif shift > 28:
            return  # no such number is written
