"""Rust's own mangling, undone: of real libraries, and of what an attacker may write."""

import re
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.recorder.unwinding.demangling import Demangler
from services.recorder.unwinding.rust_names import readable
from tests.support.requirements import need_program


def rust_library(module: str) -> Path:
    """A library made of Rust, with symbols, of a package that the tests need anyway."""
    found = find_spec(module)
    assert found is not None and found.origin is not None
    return next(Path(found.origin).parent.glob("*.so"))


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_RNvCs7qoMWBoZgYL_3app5parse", "app::parse"),
        ("_RNvMs_NtCs1_3app3mapINtB4_3MaphE2at", "app::map::Map<u8>::at"),
        ("_RNvXCs1_3appNtB2_1ANtB2_3Run2go", "<app::A as app::Run>::go"),
        ("_RNCNvCs1_3app4mains_0.llvm.123", "app::main::{closure#1}"),
        ("_RNSNvCs1_3app4main6vtable", "app::main::{shim:vtable#0}"),
        (
            "_RINvCs1_3app3runTRhQSmPuOeAhj10_EKb1_FUKCtEiDNtB2_3RunEL_E",
            "app::run<(&u8, &mut [u32], *const (), *mut str, [u8; 16]), true, "
            'unsafe extern "C" fn(u16) -> isize, dyn app::Run>',
        ),
        ("_RINvCs1_3app3runKln5_Kc41_KpE", "app::run<-5, '\\u{41}', _>"),
        ("_RNvCs1_3appu8gdel_5qa", "app::gödel"),
        ("_RNvCs1_3app", None),
        ("_RNvCs1_3app9parse", None),
        ("_Rust", None),
        ("_R", None),
        ("main", None),
    ],
)
def test_name_is_that_of_the_source(symbol: str, name: str | None) -> None:
    assert readable(symbol) == name
    assert Demangler().readable(symbol) == name


def bare(text: str) -> str:
    """Return what a name says, without how: crates' hashes, lifetimes, ::<T> for <T>."""
    text = text.partition(" (.llvm")[0].partition(" [clone")[0]
    return re.sub(r"\[[0-9a-f]{8,16}\]|for<[^<>]*> |'[a-z_]\d* ?|: (?:usize|bool)|[<>:]", "", text)


@pytest.mark.parametrize("module", ["rpds.rpds", "hypothesis._native"])
def test_names_of_a_real_library_are_those_that_binutils_tells(module: str) -> None:
    need_program("nm")
    need_program("c++filt")
    listed = subprocess.run(
        ["nm", rust_library(module)], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in listed.stdout.splitlines() if " _R" in line]
    assert len(symbols) > 500

    told = subprocess.run(
        ["c++filt", "-s", "rust"], input="\n".join(symbols), capture_output=True, text=True,
        check=True,
    ).stdout.splitlines()  # fmt: skip

    for symbol, expected in zip(symbols, told, strict=True):
        assert bare(readable(symbol) or "") == bare(expected), symbol


_BOMB = "_RIC1aT" + "T".join(f"B{digit}_" * 30 for digit in "0123456789ab") + "E" * 20


@pytest.mark.parametrize(
    "symbol",
    [
        *("_R" + one * 2000 for one in ("I", "M", "X", "Y", "Nv", "S", "R", "T", "A", "F", "D")),
        *("_RIC1a" + one * 2000 for one in ("S", "T", "R", "B_", "Th", "TB4_", "h", "Kh")),
        "_RB_",
        "_RNvB_1a",
        "_RNvC1aB" + "z" * 1000 + "_",
        "_RC" + "9" * 2000,
        "_RINvC1a1bKh" + "f" * 2000 + "_E",
        _BOMB,
        "_RIC1a" + "T" + "h" * 100 + "E" + "".join(f"T{'B5_' * 90}E" for _ in range(20)) + "E",
    ],
)
def test_symbol_that_would_take_long_stays_as_it_is(symbol: str) -> None:
    began = time.process_time()
    found = readable(symbol)
    assert time.process_time() - began < 2
    assert found is None or len(found) < 10_000


def repeated(part: str) -> str:
    """A name with a type that has a part no name tells, and with references to it."""
    return f"_RIC1aTIC1b{part}E{'B4_' * 150}EE"


def test_what_no_name_tells_costs_as_well() -> None:
    """A reference reads it once more, and in a symbol as long as there may be it takes a second."""
    assert (readable(repeated("L_" * 5)) or "").startswith("a<(b<>, b<>")
    assert (readable(repeated(f"L{'0' * 11}_")) or "").startswith("a<(b<>, b<>")
    assert readable(repeated("L_" * 1500)) is None
    assert readable(repeated(f"L{'0' * 3000}_")) is None


_LETTERS = st.text("RNvCXYMIBEKTSAFDGLs_0123456789abhjpun", max_size=60)


@given(_LETTERS | st.text(max_size=20))
def test_anything_is_a_name_or_none(text: str) -> None:
    for symbol in (text, f"_R{text}", f"_RNvC1a{text}"):
        found = readable(symbol)
        assert found is None or (symbol.startswith("_R") and len(found) < 10_000)
