"""Frames as a backtrace names them, of stacks that drgn's own real ones are rarely like."""

import struct
from dataclasses import dataclass, field
from typing import Any

import drgn
import pytest

from services.recorder.unwinding import naming
from services.recorder.unwinding.backtrace import LoadedModule
from services.recorder.unwinding.frame_pointers import across_stacks
from services.recorder.unwinding.go_table import Function
from services.recorder.unwinding.naming import Namer


@dataclass
class Symbol:
    name: str
    address: int


@dataclass
class Stopped:
    """A frame as drgn has it."""

    pc: int
    sp: int
    function_name: str | None = None
    is_inline: bool = False
    interrupted: bool = False
    found: Symbol | None = None
    asked: int = 0

    def symbol(self) -> Symbol:
        self.asked += 1
        if self.found is None:
            raise LookupError
        return self.found

    def source(self) -> tuple[str, int, int]:
        raise LookupError


class Outermost:
    is_inline = False

    @property
    def pc(self) -> int:
        raise LookupError


@dataclass
class Program:
    """A program by the symbols that it has at addresses."""

    symbols: dict[int, Symbol] = field(default_factory=dict)
    words: dict[int, int] = field(default_factory=dict)
    platform: drgn.Platform | None = None

    def read_u64(self, address: int) -> int:
        return self.words[address]

    def module(self, address: int) -> None:
        raise LookupError

    def symbol(self, address: int) -> Symbol:
        try:
            return self.symbols[address]
        except KeyError:
            raise LookupError from None

    def source_location(self, address: int) -> Any:
        raise LookupError


def names(*trace: Any, program: Program | None = None) -> list[str | None]:
    namer = Namer(program or Program(), [LoadedModule(path="/bin/app", start=0, end=1 << 40)])
    return [frame.symbol for frame in namer.frames(trace)]


def test_stack_ends_at_the_outermost_frame_and_at_address_0() -> None:
    f, g = Stopped(0x10, 1, "f"), Stopped(0x20, 2, "g")
    assert names(f, Outermost(), g) == ["f"]
    assert names(f, Stopped(0, 2), g) == ["f"]
    assert names(Stopped(0, 1), f) == [None, "f"]  # it was called, and is the crash


def test_frames_that_come_once_more_are_left_out() -> None:
    inlined = Stopped(0x10, 1, "inlined", is_inline=True)
    f, g = Stopped(0x10, 1, "f"), Stopped(0x20, 2, "g")
    assert names(inlined, f, g, inlined, f, g, Stopped(0x30, 3, "main")) == [
        *("inlined", "f", "g", "main")
    ]
    recursion = [Stopped(0x10, place, "f") for place in range(5)]
    assert names(*recursion) == ["f"] * 5


def test_mangled_symbol_is_told_instead_of_a_name_without_its_class() -> None:
    symbol = Symbol("_ZN3app1A2goEPi", 0x10)
    inlined = Stopped(0x12, 1, "look", is_inline=True, found=symbol)
    assert names(inlined, Stopped(0x12, 1, "go", found=symbol)) == ["look", "_ZN3app1A2goEPi"]
    assert names(Stopped(0x12, 1, "parse", found=Symbol("parse.isra.0", 0x10))) == ["parse"]


@pytest.mark.parametrize(
    ("called", "found", "name"),
    [
        ("runtime.sigpanic", Symbol("main.crashHere", 0x40), "main.crashHere"),
        ("handler", Symbol("__restore_rt", 0x40), "__restore_rt"),
        ("abort", Symbol("next_function", 0x40), None),
        ("runtime.sigpanic", Symbol("around", 0x30), None),
    ],
)
def test_return_address_that_begins_a_function(
    called: str, found: Symbol, name: str | None
) -> None:
    """It is that function's only if it was put there by hand."""
    program = Program({0x40: found})
    assert names(Stopped(0x10, 1, called), Stopped(0x40, 2), program=program) == [called, name]


class GoFunctions:
    """What a Go program's table tells of three functions; the first one keeps 8 bytes."""

    def find(self, pc: int) -> Function | None:
        name = {0x10: "leaf", 0x20: "between", 0x30: "main.main"}.get(pc & ~0xF)
        return Function(name, pc & ~0xF, None, 8) if name else None


@pytest.mark.parametrize(
    ("arch", "between"),
    [
        (drgn.Architecture.X86_64, ["between"]),
        (drgn.Architecture.AARCH64, []),
        (None, []),
    ],
)
def test_caller_that_only_the_stack_tells_is_of_x86_64(
    monkeypatch: pytest.MonkeyPatch, arch: drgn.Architecture | None, between: list[str]
) -> None:
    """Elsewhere a call leaves its return address in a register, and the stack has anything."""
    monkeypatch.setattr(naming, "GoNames", lambda *_: GoFunctions())
    program = Program(words={0x1008: 0x25}, platform=drgn.Platform(arch) if arch else None)
    trace = Stopped(0x14, 0x1000, interrupted=True), Stopped(0x34, 0x2000)

    assert names(*trace, program=program) == ["leaf", *between, "main.main"]


class Chain:
    """Memory in which each frame pointer leads a step further, and round where it should."""

    def __init__(self, step: int, size: int) -> None:
        self._step, self._size = step, size

    def read(self, address: int, size: int) -> bytes:
        return struct.pack("<QQ", (address + self._step) % self._size, 0x401000)


@pytest.mark.parametrize(
    ("step", "size", "found"), [(0, 1 << 32, 1), (16, 64, 4), (16, 1 << 32, 1024)]
)
def test_chain_of_frame_pointers_that_does_not_end_is_left(
    step: int, size: int, found: int
) -> None:
    """Who crashed wrote it."""
    assert list(across_stacks(Chain(step, size), 0)) == [0x401000] * found


def test_symbol_is_asked_for_once() -> None:
    """It costs drgn a search."""
    trace = [Stopped(0x10, 1, found=Symbol("f", 0x10)), Stopped(0x24, 2)]
    assert names(*trace) == ["f", None]
    assert [frame.asked for frame in trace] == [1, 1]
