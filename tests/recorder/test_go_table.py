"""The table of a stripped Go program: a real one, and whatever a crashed process may forge."""

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drgn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.recorder.unwinding.backtrace import MAX_TEXT, ModuleFile
from services.recorder.unwinding.go_names import GoNames
from services.recorder.unwinding.go_table import _HEAD, BadTable, Function, GoTable
from services.recorder.unwinding.sections import sections_of
from tests.support import go
from tests.support.crashers import SOURCES
from tests.support.requirements import need_program

_FUNCTIONS = ("main.main", "main.call", "main.(*holder).crashHere", "runtime.sigpanic")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Go program that keeps its symbols, to compare with."""
    return built(tmp_path_factory.mktemp("go") / "program")


def built(program: Path, *options: str) -> Path:
    return go.build("debian", program, SOURCES / "crash.go", *options)


@pytest.fixture(scope="module")
def table(program: Path) -> bytes:
    with program.open("rb") as file:
        _, offset, size = sections_of(file.fileno())[b".gopclntab"]
        return os.pread(file.fileno(), size, offset)


def reader(raw: bytes) -> Callable[[int, int], bytes]:
    def read(at: int, size: int) -> bytes:
        assert size <= 16 * 1024
        return raw[at : at + size] if at >= 0 else b""

    return read


def symbols_of(program: Path) -> dict[str, int]:
    need_program("nm")
    listed = ["nm", "--defined-only", str(program)]
    lines = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    found = (line.split(maxsplit=2) for line in lines.splitlines())
    return {name: int(at, 16) for at, kind, name in found if kind in "tT"}


def functions_of(program: Path) -> dict[str, int]:
    found = {
        name: at
        for name, at in symbols_of(program).items()
        if name.startswith(("main.", "runtime.")) and not name.endswith((".abi0", "text"))
    }
    assert found.keys() >= {"main.main", "main.(*holder).crashHere"} and len(found) > 500
    return found


def of_go_1_16(table: bytes) -> bytes:
    """Write a table of Go 1.18 as 1.16 has it: with whole addresses, and none of the code's."""
    _, _, quantum, _, count, files, text, *offsets = _HEAD.unpack_from(table)
    functions = offsets.pop()
    places = struct.unpack_from(f"<{2 * count + 1}I", table, functions)
    moved = functions + _HEAD.size  # behind a copy of all before
    at, functab, data = 8 * (2 * count + 1), b"", b""
    for entry, place in zip(places[::2], places[1::2], strict=False):
        functab += struct.pack("<QQ", text + entry, at + len(data))
        data += struct.pack("<Q", text + entry) + table[functions + place + 4 :][:36]
    functab += struct.pack("<Q", text + places[-1])
    words = [*(offset + _HEAD.size for offset in offsets), moved, 0]
    head = _HEAD.pack(0xFFFFFFFA, 0, quantum, 8, count, files, *words)
    return head + table[:functions] + functab + data


@pytest.fixture(params=["1.16", "1.18", "1.20", "1.26"])
def made(request: pytest.FixtureRequest, table: bytes) -> GoTable:
    """The table as versions of Go write it; the compiler here has but one."""
    text = int.from_bytes(table[24:32], "little")
    match request.param:
        case "1.16":
            table = of_go_1_16(table)
        case "1.20":
            table = b"\xf1" + table[1:]
        case "1.26":
            table = b"\xf1" + table[1:24] + bytes(8) + table[32:]
    return GoTable(reader(table), text)


def test_every_function_is_where_its_symbol_is(program: Path, made: GoTable) -> None:
    symbols = functions_of(program)

    for name, at in symbols.items():
        first, second = made.find(at), made.find(at + 1)
        assert first is not None and second is not None
        assert (first.name, first.entry, second.entry) == (name, at, at)


@pytest.fixture(scope="module")
def with_c(program: Path) -> Path:
    """The program as with cgo: the system's linker puts C code before Go's."""
    return built(program.with_name("with-c"), "-ldflags=-linkmode=external")


def as_go_1_26(program: Path, place: Path, has_module: bool) -> None:
    """Write a program as Go 1.26 does: where its code is stands in a section of its own alone."""
    need_program("objcopy")
    raw = bytearray(program.read_bytes())
    with program.open("rb") as file:
        sections = sections_of(file.fileno())
    address, offset, _ = sections[b".gopclntab"]
    raw[offset + 24 : offset + 32] = bytes(8)
    place.write_bytes(raw)
    if has_module:
        at = raw.index(address.to_bytes(8, "little"), sections[b".noptrdata"][1])
        (place.with_name("module")).write_bytes(raw[at : at + 512])
        added = f"--add-section=.go.module={place.with_name('module')}"
        subprocess.run(["objcopy", added, place], check=True)


class WithoutMemory:
    """A program where it was linked to be, of which there is but the file."""

    loaded_file_bias = 0
    address_ranges = ((0x400000, 0x800000),)
    build_id = None
    name = ""

    def module(self, address: int) -> Any:
        return self

    def read(self, address: int, size: int) -> bytes:
        raise drgn.FaultError("not in the core", address)


def names_of(program: Path, places: dict[str, int]) -> dict[str, int]:
    with program.open("rb") as file:
        mapped = ModuleFile(path="", start=0x400000, end=0x800000, file=file.fileno())
        asked = GoNames(WithoutMemory(), [mapped])
        found = [asked.find(at + 1) for at in places.values()]
    return {one.name: one.entry for one in found if one}


@pytest.mark.parametrize("has_module", [True, False])
def test_go_1_26_with_c_has_its_own_names_or_none(
    with_c: Path, tmp_path: Path, has_module: bool
) -> None:
    symbols = functions_of(with_c)
    as_go_1_26(with_c, tmp_path / "program", has_module)

    assert names_of(with_c, symbols) == symbols
    assert names_of(tmp_path / "program", symbols) == (symbols if has_module else {})


def test_go_1_26_without_c_has_names_where_its_module_is_not_in_memory(
    program: Path, tmp_path: Path
) -> None:
    symbols = functions_of(program)
    as_go_1_26(program, tmp_path / "program", has_module=False)

    assert names_of(tmp_path / "program", symbols) == symbols


@pytest.mark.parametrize(
    "options", [(), ("-buildmode=pie",), ("-ldflags=-linkmode=external",)], ids=str
)
def test_newest_go_s_functions_are_where_their_symbols_are(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    program = go.build(go.NEWEST, tmp_path / "program", SOURCES / "crash.go", *options)
    symbols = functions_of(program)
    with program.open("rb") as file:
        assert b".go.module" in sections_of(file.fileno())

    assert names_of(program, symbols) == symbols


def test_lines_are_those_of_debug_information(program: Path, made: GoTable) -> None:
    need_program("addr2line")
    symbols = symbols_of(program)
    places = [symbols[name] + offset for name in _FUNCTIONS for offset in (0, 5)]

    asked = ["addr2line", "-e", str(program), *map(hex, places)]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")

    found = [one.source if (one := made.find(place)) else None for place in places]
    assert found == [line.partition(" ")[0] for line in told[: len(places)]]


def test_what_is_no_function_is_none(table: bytes) -> None:
    made = GoTable(reader(table), 0)
    assert made.find(0) is None
    assert made.find(1 << 63) is None


def ask(raw: bytes, places: list[int]) -> None:
    try:
        made = GoTable(reader(raw), 0x401000)
    except BadTable:
        return
    for place in places:
        try:
            found = made.find(place)
        except BadTable:
            continue
        assert found is None or isinstance(found, Function)
        assert found is None or len(found.name) <= 4 * MAX_TEXT


_PLACES = st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0x401000, 0x500000), max_size=5)


@given(st.sampled_from([0xFA, 0xF0, 0xF1]), st.binary(max_size=3000), _PLACES)
def test_table_of_anything_is_answered_or_refused(
    magic: int, raw: bytes, places: list[int]
) -> None:
    ask(bytes((magic, 0xFF, 0xFF, 0xFF, 0, 0, 1, 8)) + raw, places)


@given(
    data=st.data(),
    changes=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), max_size=8),
)
def test_real_table_that_was_changed_is_answered_or_refused(
    table: bytes, data: st.DataObject, changes: list[tuple[int, bytes]]
) -> None:
    raw = bytearray(table)
    for at, new in changes:
        raw[at : at + len(new)] = new
    for _ in range(3):
        at = data.draw(st.integers(0, len(raw) - 8))
        raw[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    ask(bytes(raw[:cut]), data.draw(_PLACES))


def test_table_that_never_ends_takes_no_long_time(table: bytes) -> None:
    """Each function says that its lines are the longest there can be."""
    raw = table + b"\2\0" * (1 << 20)  # the value grows by one, for no byte
    made = GoTable(lambda at, size: raw[at : at + size] if at < 4096 else b"\2\0" * (size // 2), 0)
    for place in range(0x401000, 0x401000 + 2000):
        made._value(1, place)
    assert made._steps <= 0


@given(st.binary(max_size=300), st.booleans())
def test_file_of_anything_has_sections_or_none(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, is_elf: bool
) -> None:
    place = tmp_path_factory.getbasetemp() / "sections"
    place.write_bytes((b"\x7fELF\2\1\1" + bytes(9)) * is_elf + raw)
    with place.open("rb") as file:
        assert isinstance(sections_of(file.fileno()), dict)
