"""Python frames, of the real interpreter and of memory that lies."""

import dis
import json
import struct
from functools import partial
from pathlib import Path
from types import CodeType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.recorder.unwinding import python_frames
from services.recorder.unwinding.backtrace import PythonFrame
from services.recorder.unwinding.python_frames import Interpreter, line_of
from services.recorder.unwinding.python_layouts import TABLES, VERSIONS, layout_of
from tests.recorder.conftest import MakeRecorder
from tests.support.pythons import interpreter, is_installed
from tests.support.recorder import crash

SCRIPT = """\
import ctypes, threading

class Über:
    def method(self, depth):
        if depth:
            return self.method(
                depth - 1
            )
        return list(map(lambda _: self.crash(), range(1)))

    def crash(self):
        ctypes.string_at(0)

def waits(barrier):
    barrier.wait()
    threading.Event().wait()

barrier = threading.Barrier(2)
threading.Thread(target=waits, args=(barrier,), daemon=True).start()
barrier.wait()
Über().method(2)
"""


# What few machines have is tried where it is; `test_free_threaded…` stands in for it elsewhere.
TRIED = sorted(one for one in VERSIONS if one != (3, 14) or is_installed(one))


@pytest.mark.parametrize("version", TRIED, ids=lambda version: "{}.{}".format(*version))
async def test_crash_in_a_library_shows_the_python_that_called_it(
    recorder_with: MakeRecorder, tmp_path: Path, version: tuple[int, int]
) -> None:
    python = interpreter(version)
    recorder = recorder_with()
    await recorder.start()
    script = tmp_path / "scrípt.py"
    script.write_text(SCRIPT)

    pid, _ = crash(python, script)
    await recorder.captured(pid)

    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    crashed, other = found["threads"]
    mine = [(one["function"], one["line"]) for one in crashed["python"]]
    assert mine == [
        ("string_at", mine[0][1]),
        ("Über.crash", 12),
        ("Über.method.<locals>.<lambda>", 9),
        ("Über.method", 9),
        ("Über.method", 6),
        ("Über.method", 6),
        ("<module>", 21),
    ]
    assert {one["file"] for one in crashed["python"][1:]} == {str(script)}
    assert crashed["python"][0]["file"].endswith("ctypes/__init__.py")
    waiting = [one["line"] for one in other["python"] if one["function"] == "waits"]
    assert waiting in ([15], [16])
    text = recorder.file(pid, "backtrace").read_text()
    assert f"--- python\n#0 string_at  at {crashed['python'][0]['file']}:" in text
    assert f"\n#1 Über.crash  at {script}:12\n" in text


def lines_of(code: CodeType) -> list[tuple[int, int | None]]:
    """Return offset and line of each instruction, as the interpreter itself tells them."""
    return [
        (one.offset, one.positions.lineno if one.positions else None)
        for one in dis.get_instructions(code)
    ]


def test_lines_are_those_of_the_interpreter() -> None:
    codes = [compile(SCRIPT, "x", "exec")]
    source = Path(json.__file__).parent.joinpath("decoder.py").read_text()
    codes.append(compile("\n" * 70 + source, "x", "exec"))
    seen = 0
    while codes:
        code = codes.pop()
        codes.extend(one for one in code.co_consts if isinstance(one, CodeType))
        for offset, line in lines_of(code):
            assert line_of(code.co_linetable, code.co_firstlineno, offset) == line
            seen += 1
    assert seen > 500


@given(st.binary(max_size=200), st.integers(-(2**63), 2**63), st.integers(-(2**63), 2**63))
def test_no_table_makes_it_fail(table: bytes, first: int, offset: int) -> None:
    found = line_of(table, first, offset)
    assert found is None or isinstance(found, int)


class Noise:
    """Memory that leads in circles."""

    def __init__(self, noise: bytes) -> None:
        self._noise = noise or b"\x01"
        self.reads = 0

    def read(self, address: int, size: int) -> bytes:
        self.reads += 1
        if size > 1 << 20:
            raise ValueError("far too much is asked for")
        start = address % len(self._noise)
        return (self._noise * (size // len(self._noise) + 2))[start : start + size]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_frames, "MAX_THREADS", 8)
    monkeypatch.setattr(python_frames, "MAX_FRAMES", 8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=64), st.sampled_from(sorted(TABLES)))
def test_memory_that_lies_ends_somewhere(few: None, noise: bytes, version: tuple[int, int]) -> None:
    memory = Noise(noise)
    threads = Interpreter(memory, 0, TABLES[version]).threads()
    assert len(threads) <= 8
    assert memory.reads < 2000


class Built:
    """Memory of what is put into it; all else is not there."""

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}

    def put(self, address: int, value: bytes | int) -> None:
        raw = value if isinstance(value, bytes) else value.to_bytes(8, "little")
        self._bytes.update(zip(range(address, address + len(raw)), raw, strict=True))

    def read(self, address: int, size: int) -> bytes:
        return bytes(self._bytes[place] for place in range(address, address + size))


def runtime(version: int, free_threaded: int, *offsets: int) -> bytes:
    """Return the beginning of _PyRuntime."""
    return b"xdebugpy" + struct.pack(f"<{len(offsets) + 2}Q", version, free_threaded, *offsets)


# Of 3.14's members, in their order; each offset another one, and none a real interpreter's.
OFFSETS_3_14 = (
    *(9, 9, 900),  # runtime: …, interpreters_head
    *(9, 9, 16, 24, *(9,) * 12),  # interpreter: …, next, threads_head, …
    *(9, 9, 32, 9, 40, 9, 48, 9, 9),  # thread: …, next, …, current_frame, …, native_thread_id, …
    *(9, 56, 64, 72, 9, 80, 9, 84),  # frame: previous, executable, instr_ptr, …, owner, …, copy
    *(9, 88, 9, 96, 104, 112, 9, 9, 9, 120, 128),  # code: filename, …, qualname, linetable, …
    *(9,) * (2 + 4 + 3 + 3 + 4 + 3 + 2 + 3),  # object, type, tuple, list, set, dict, float, long
    *(9, 8, 16),  # bytes: ob_size, ob_sval
    *(9, 20, 8, 32),  # unicode: state, length, asciiobject_size
)


def put_text(memory: Built, address: int, text: str) -> None:
    """Put a str object of a free-threaded interpreter, whose characters have two bytes."""
    width, is_compact, is_ascii = (1, 1, 1) if text.isascii() else (2, 1, 0)
    memory.put(address + 8, len(text))
    state = 0xFF | (width | is_compact << 3 | is_ascii << 4) << 8
    memory.put(address + 20, state.to_bytes(4, "little"))
    start = address + (32 if is_ascii else 48)
    memory.put(start, text.encode("ascii" if is_ascii else "utf-16-le"))


def test_free_threaded_interpreter_tells_where_its_frames_are() -> None:
    """Of 3.14, of which few machines have one: all there is to it, at places of its own."""
    memory = Built()
    interpreter, thread, inner, between, outer, code = range(0x10000, 0x70000, 0x10000)
    memory.put(0x1000, runtime(0x030E08F0, 1, *OFFSETS_3_14))
    built: tuple[tuple[int, dict[int, int | bytes]], ...] = (
        (0x1000, {900: interpreter}),
        (interpreter, {16: 0, 24: thread}),
        (thread, {32: 0, 40: inner, 48: 4711}),
        (inner, {56: between, 64: code | 1, 72: 0xC004, 80: b"\0", 84: 2}),
        (between, {56: outer, 80: b"\3"}),  # what stands for C has nothing else
        (outer, {56: 0, 64: code, 72: code + 120 + 2, 80: b"\1", 84: 0}),
        (code, {88: 0xA000, 96: 0xA100, 104: 0xA200, 112: 7, 128: 0xB000}),
        (0xB000, {0: 3, 8: 0, 16: 0, 24: 0xC000}),  # the copies of the code
        # Two bytes of code on the first line, then two on the next, then two two lines further on.
        (0xA200, {8: 3, 16: bytes([0x80 | 10 << 3, 0x80 | 11 << 3, 0x80 | 12 << 3])}),
    )
    for place, members in built:
        for offset, value in members.items():
            memory.put(place + offset, value)
    put_text(memory, 0xA000, "/srv/app.py")
    put_text(memory, 0xA100, "größer")

    found = Interpreter(memory, 0x1000, layout_of(memory, 0x1000, None)).threads()

    app = partial(PythonFrame, function="größer", file="/srv/app.py")
    assert found == {4711: (app(line=10), app(line=8))}


@given(st.binary(min_size=16, max_size=600))
def test_offsets_that_lie_are_refused_or_lead_to_an_end(noise: bytes) -> None:
    memory = Built()
    memory.put(0, b"xdebugpy" + noise.ljust(700, b"\0"))
    with pytest.raises((KeyError, ValueError)):
        Interpreter(memory, 0, layout_of(memory, 0, (3, 13))).threads()


def test_offset_beyond_any_structure_is_refused() -> None:
    memory = Built()
    memory.put(0, runtime(0x030D00F0, 0, *(9,) * 66, 1 << 40, *(9,) * 20))
    with pytest.raises(ValueError, match="no offsets"):
        layout_of(memory, 0, (3, 13))


@pytest.mark.parametrize("version", [None, (3, 0), (3, 13)])
def test_version_that_is_not_known_is_an_error(version: tuple[int, int] | None) -> None:
    with pytest.raises(KeyError):
        layout_of(Noise(b"x"), 0, version)
    memory = Built()
    memory.put(0, runtime(0x030F00F0, 0))  # 3.15
    with pytest.raises(KeyError):
        layout_of(memory, 0, version)
