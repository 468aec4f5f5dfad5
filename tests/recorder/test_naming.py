"""Frames as a backtrace names them, of stacks that drgn's own real ones are rarely like."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from services.recorder.backtrace import LoadedModule
from services.recorder.naming import Namer


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

    def symbol(self) -> Symbol:
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
