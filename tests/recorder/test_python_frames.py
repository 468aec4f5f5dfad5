"""Python frames, of the real interpreter and of memory that lies."""

import dis
import json
import subprocess
from pathlib import Path
from types import CodeType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.recorder import python_frames
from services.recorder.python_frames import Interpreter, line_of
from tests.recorder.conftest import MakeRecorder
from tests.support.recorder import crash
from tests.support.requirements import lacking

PYTHON = "/usr/bin/python3"

SCRIPT = """\
import ctypes, threading

class Über:
    def method(self, depth):
        if depth:
            return self.method(
                depth - 1
            )
        return [self.crash() for _ in range(1)]

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


def version_of(python: str) -> tuple[int, int]:
    code = "import sys; print(*sys.version_info[:2])"
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    major, minor = shown.split()
    return int(major), int(minor)


async def test_crash_in_a_library_shows_the_python_that_called_it(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    if version_of(PYTHON) not in python_frames.LAYOUTS:
        lacking(f"{PYTHON} is of a version whose structures are not known")
    recorder = recorder_with()
    await recorder.start()
    script = tmp_path / "scrípt.py"
    script.write_text(SCRIPT)

    pid, _ = crash(PYTHON, script)
    await recorder.captured(pid)

    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    crashed, other = found["threads"]
    mine = [(one["function"], one["line"]) for one in crashed["python"]]
    assert mine == [
        ("string_at", mine[0][1]),
        ("Über.crash", 12),
        ("Über.method.<locals>.<listcomp>", 9),
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


@given(st.binary(min_size=1, max_size=64))
def test_memory_that_lies_ends_somewhere(noise: bytes) -> None:
    memory = Noise(noise)
    small = python_frames.MAX_THREADS, python_frames.MAX_FRAMES
    python_frames.MAX_THREADS, python_frames.MAX_FRAMES = 8, 8
    try:
        threads = Interpreter(memory, 0, (3, 11)).threads()
    finally:
        python_frames.MAX_THREADS, python_frames.MAX_FRAMES = small
    assert len(threads) <= 8
    assert memory.reads < 2000


def test_version_that_is_not_known_is_an_error() -> None:
    with pytest.raises(KeyError):
        Interpreter(Noise(b"x"), 0, (3, 0))
