"""The Python frames of a process that ran CPython, read from its core.

All that is read was the process's to write: each walk is bounded and ends at the first thing that
is wrong.
"""

from collections.abc import Iterator

from services.recorder.unwinding.backtrace import MAX_TEXT, PythonFrame
from services.recorder.unwinding.python_layouts import Layout, Memory

MAX_FRAMES = 512  # of one thread
MAX_ALL_FRAMES = 20_000
MAX_THREADS = 4096
_MAX_STRING = MAX_TEXT
_MAX_TABLE = 256 * 1024  # bytes of a table of line numbers
_POINTER = 8
_TAGS = 7  # bits of a pointer to an object that may say how it is held (_PyStackRef)
_OF_FUNCTIONS = 2  # FRAME_OWNED_BY_FRAME_OBJECT; others stand for C between Python's
_MAX_COPIES = 1 << 20  # of a function's code; as many as there were threads


class Interpreter:
    """CPython in a process's memory.

    Args:
        runtime: address of ``_PyRuntime``.
    """

    def __init__(self, memory: Memory, runtime: int, layout: Layout) -> None:
        self._memory = memory
        self._runtime = runtime
        self._at = layout
        self._left = MAX_ALL_FRAMES
        self._codes: dict[int, tuple[str, str, int, bytes]] = {}

    def threads(self) -> dict[int, tuple[PythonFrame, ...]]:
        """Return the frames of each thread, innermost first, by its ID in its own namespace."""
        found: dict[int, tuple[PythonFrame, ...]] = {}
        for thread in self._thread_states():
            native = self._word(thread + self._at.thread_native_id)
            found[native] = tuple(self._frames(thread))
        return found

    def _thread_states(self) -> Iterator[int]:
        at, seen = self._at, 0
        interpreter = self._word(self._runtime + at.runtime_interpreters)
        while interpreter and seen < MAX_THREADS:
            thread = self._word(interpreter + at.interpreter_threads)
            while thread and seen < MAX_THREADS:
                yield thread
                seen += 1
                thread = self._word(thread + at.thread_next)
            seen += 1
            interpreter = self._word(interpreter + at.interpreter_next)

    def _frames(self, thread: int) -> Iterator[PythonFrame]:
        at = self._at
        try:
            frame = self._word(thread + at.thread_frame)
            if at.current_frame is not None:
                frame = self._word(frame + at.current_frame)
            for _ in range(MAX_FRAMES):
                if not frame or not self._left:
                    return
                self._left -= 1
                if self._memory.read(frame + at.frame_owner, 1)[0] <= _OF_FUNCTIONS:
                    yield self._frame(frame)
                frame = self._word(frame + at.frame_previous)
        except Exception:  # noqa: BLE001 - what was found so far is worth more than nothing
            return

    def _frame(self, frame: int) -> PythonFrame:
        at = self._at
        code = self._word(frame + at.frame_code) & ~_TAGS
        done = self._word(frame + at.frame_instruction) - self._instructions(frame, code)
        if code not in self._codes:
            self._codes[code] = self._code(code)
        function, file, first, lines = self._codes[code]
        return PythonFrame(function=function, file=file, line=line_of(lines, first, done))

    def _instructions(self, frame: int, code: int) -> int:
        """Return where the instructions begin that a frame runs."""
        at = self._at
        if at.frame_copy is not None:
            copy = int.from_bytes(self._memory.read(frame + at.frame_copy, 4), "little")
            if 0 < copy < _MAX_COPIES:
                # struct _PyCodeArray: a size, then pointers.
                copies = self._word(code + at.code_copies)
                return self._word(copies + _POINTER * (1 + copy))
        return code + at.code_instructions

    def _code(self, code: int) -> tuple[str, str, int, bytes]:
        """Return name, file, first line and table of lines of a code object."""
        at = self._at
        return (
            self._text(self._word(code + at.code_qualname)),
            self._text(self._word(code + at.code_filename)),
            int.from_bytes(self._memory.read(code + at.code_first_line, 4), "little"),
            self._bytes(self._word(code + at.code_lines)),
        )

    def _word(self, address: int) -> int:
        return int.from_bytes(self._memory.read(address, _POINTER), "little")

    def _text(self, address: int) -> str:
        """Return a str object: one, two or four bytes a character, or ASCII (PEP 393)."""
        at = self._at
        length = min(self._word(address + at.text_length), _MAX_STRING)
        bits = int.from_bytes(self._memory.read(address + at.text_state, 4), "little")
        state = bits >> at.text_kind
        width, is_compact, is_ascii = state & 7, state >> 3 & 1, state >> 4 & 1
        if width not in (1, 2, 4) or not is_compact:
            raise ValueError("not a str object")
        start = address + (at.text_ascii if is_ascii else at.text_compact)
        raw = self._memory.read(start, length * width)
        encoding = {1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}[width]
        return raw.decode(encoding, "backslashreplace")

    def _bytes(self, address: int) -> bytes:
        size = self._word(address + self._at.bytes_size)
        if size > _MAX_TABLE:
            return b""
        return self._memory.read(address + self._at.bytes_data, size)


def line_of(table: bytes, first: int, offset: int) -> int | None:
    """Return the line of the instruction at an offset in bytes; None where none is told.

    The format is that of CPython's Objects/locations.md.
    """
    line, start, place = first, 0, 0
    while place < len(table):
        code, size = table[place] >> 3 & 15, 2 * ((table[place] & 7) + 1)
        place += 1
        if code in (13, 14):
            value = _number(table, place)
            line += -(value >> 1) if value & 1 else value >> 1
        elif 10 <= code <= 12:
            line += code - 10
        if start <= offset < start + size:
            return None if code == 15 else line
        start += size
        while place < len(table) and not table[place] & 0x80:  # the entry's other bytes
            place += 1
    return None


def _number(table: bytes, place: int) -> int:
    """Return a number of six bits a byte, least significant first."""
    value = shift = 0
    while place < len(table):
        byte = table[place]
        value |= (byte & 63) << shift
        place, shift = place + 1, shift + 6
        if not byte & 64 or shift > 60:
            break
    return value
