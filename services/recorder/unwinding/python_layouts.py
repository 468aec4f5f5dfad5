"""Where CPython keeps what its frames are found by, for each version that is known.

The structures are not an interface and differ between versions. From 3.13 on an interpreter tells
debuggers itself where they are, at the beginning of ``_PyRuntime`` (struct _Py_DebugOffsets); for
earlier ones there is a table (Include/internal/pycore_runtime.h, pycore_interp.h, pycore_frame.h,
Include/cpython/pystate.h, code.h, unicodeobject.h of that version; 64-bit layouts).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

_COOKIE = b"xdebugpy"
_FARTHEST = 1 << 20  # bytes; no structure is so large


class Memory(Protocol):
    """What a process had in memory."""

    def read(self, address: int, size: int, /) -> bytes:
        """Read exactly `size` bytes.

        Raises:
            Exception: they are not there.
        """


@dataclass(frozen=True)
class Layout:
    """Offsets in bytes of one version.

    Attributes:
        thread_frame: of the pointer to the innermost frame, or to what has it.
        current_frame: of the innermost frame in that; None: it is pointed at directly.
        frame_copy: of the number of the code's copy that a frame runs; None: there are none.
        code_copies: of the pointer to all copies.
        text_kind: of the width of a character, in bits within `text_state`.
    """

    runtime_interpreters: int
    interpreter_next: int
    interpreter_threads: int
    thread_next: int
    thread_frame: int
    thread_native_id: int
    frame_code: int
    frame_previous: int
    frame_instruction: int
    frame_owner: int
    code_first_line: int
    code_filename: int
    code_qualname: int
    code_lines: int
    code_instructions: int
    text_length: int
    text_state: int
    text_ascii: int
    text_compact: int
    bytes_size: int
    bytes_data: int
    current_frame: int | None = None
    frame_copy: int | None = None
    code_copies: int = 0
    text_kind: int = 2


TABLES = {
    (3, 11): Layout(
        runtime_interpreters=40,
        interpreter_next=0,
        interpreter_threads=16,
        thread_next=8,
        thread_frame=56,
        thread_native_id=160,
        current_frame=8,
        frame_code=32,
        frame_previous=48,
        frame_instruction=56,
        frame_owner=69,
        code_first_line=72,
        code_filename=112,
        code_qualname=128,
        code_lines=136,
        code_instructions=184,
        text_length=16,
        text_state=32,
        text_ascii=48,
        text_compact=72,
        bytes_size=16,
        bytes_data=32,
    ),
    (3, 12): Layout(
        runtime_interpreters=40,
        interpreter_next=0,
        interpreter_threads=72,
        thread_next=8,
        thread_frame=56,
        thread_native_id=144,
        current_frame=0,
        frame_code=0,
        frame_previous=8,
        frame_instruction=56,
        frame_owner=70,
        code_first_line=68,
        code_filename=112,
        code_qualname=128,
        code_lines=136,
        code_instructions=192,
        text_length=16,
        text_state=32,
        text_ascii=40,
        text_compact=56,
        bytes_size=16,
        bytes_data=32,
    ),
}

# The members of struct _Py_DebugOffsets behind the cookie, 64 bits each, as far as they matter.
_MEMBERS = {
    (3, 13): """
        version free_threaded
        runtime: size finalizing interpreters_head
        interpreter: size id next threads_head gc imports_modules sysdict builtins ceval_gil
            gil_runtime_state gil_enabled gil_locked gil_holder
        thread: size prev next interp current_frame thread_id native_thread_id datastack_chunk
            status
        frame: size previous executable instr_ptr localsplus owner
        code: size filename name qualname linetable firstlineno argcount localsplusnames
            localspluskinds co_code_adaptive
        object: size ob_type
        type: size tp_name tp_repr tp_flags
        tuple: size ob_item ob_size
        list: size ob_item ob_size
        dict: size ma_keys ma_values
        float: size ob_fval
        long: size lv_tag ob_digit
        bytes: size ob_size ob_sval
        unicode: size state length asciiobject_size
    """,
    (3, 14): """
        version free_threaded
        runtime: size finalizing interpreters_head
        interpreter: size id next threads_head threads_main gc imports_modules sysdict builtins
            ceval_gil gil_runtime_state gil_enabled gil_locked gil_holder code_object_generation
            tlbc_generation
        thread: size prev next interp current_frame thread_id native_thread_id datastack_chunk
            status
        frame: size previous executable instr_ptr localsplus owner stackpointer tlbc_index
        code: size filename name qualname linetable firstlineno argcount localsplusnames
            localspluskinds co_code_adaptive co_tlbc
        object: size ob_type
        type: size tp_name tp_repr tp_flags
        tuple: size ob_item ob_size
        list: size ob_item ob_size
        set: size used table mask
        dict: size ma_keys ma_values
        float: size ob_fval
        long: size lv_tag ob_digit
        bytes: size ob_size ob_sval
        unicode: size state length asciiobject_size
    """,
}
VERSIONS = frozenset(TABLES) | frozenset(_MEMBERS)


def layout_of(memory: Memory, runtime: int, version: tuple[int, int] | None) -> Layout:
    """Return the layout of an interpreter.

    Args:
        runtime: address of ``_PyRuntime``.
        version: major and minor, as far as known; needed up to 3.12.

    Raises:
        KeyError: that version is not known.
        ValueError: what the interpreter tells of itself cannot be.
    """
    if memory.read(runtime, len(_COOKIE)) == _COOKIE:
        return _told(memory, runtime + len(_COOKIE))
    if version is None:
        raise KeyError("neither name nor structures tell the version")
    return TABLES[version]


def _told(memory: Memory, place: int) -> Layout:
    """Return the layout that an interpreter tells of itself."""
    number = int.from_bytes(memory.read(place, 8), "little")  # PY_VERSION_HEX
    version = number >> 24 & 0xFF, number >> 16 & 0xFF
    names = tuple(_names(_MEMBERS[version]))
    values = struct.unpack(f"<{len(names)}Q", memory.read(place, 8 * len(names)))
    at = dict(zip(names, values, strict=True))
    if max(values[2:]) >= _FARTHEST:
        raise ValueError("these are no offsets")
    return _layout(at, version >= (3, 14))


def _names(members: str) -> Iterator[str]:
    prefix = ""
    for word in members.split():
        if word.endswith(":"):
            prefix = word.replace(":", ".")
        else:
            yield prefix + word


def _layout(at: Mapping[str, int], has_copies: bool) -> Layout:
    """Return a layout by the names that CPython has for it."""
    free_threaded = bool(at["free_threaded"]) and has_copies
    return Layout(
        runtime_interpreters=at["runtime.interpreters_head"],
        interpreter_next=at["interpreter.next"],
        interpreter_threads=at["interpreter.threads_head"],
        thread_next=at["thread.next"],
        thread_frame=at["thread.current_frame"],
        thread_native_id=at["thread.native_thread_id"],
        frame_code=at["frame.executable"],
        frame_previous=at["frame.previous"],
        frame_instruction=at["frame.instr_ptr"],
        frame_owner=at["frame.owner"],
        frame_copy=at["frame.tlbc_index"] if free_threaded else None,
        code_first_line=at["code.firstlineno"],
        code_filename=at["code.filename"],
        code_qualname=at["code.qualname"],
        code_lines=at["code.linetable"],
        code_instructions=at["code.co_code_adaptive"],
        code_copies=at["code.co_tlbc"] if free_threaded else 0,
        text_length=at["unicode.length"],
        text_state=at["unicode.state"],
        text_ascii=at["unicode.asciiobject_size"],
        # Length and pointer of its UTF-8 form stand between them.
        text_compact=at["unicode.asciiobject_size"] + 16,
        # Without the global lock `interned`, before it, has a byte of its own.
        text_kind=8 if free_threaded else 2,
        bytes_size=at["bytes.ob_size"],
        bytes_data=at["bytes.ob_sval"],
    )
