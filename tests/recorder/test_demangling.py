"""Names of C++ and Rust in a backtrace."""

import time

import pytest

from services.recorder.unwinding import demangling
from services.recorder.unwinding.backtrace import MAX_TEXT
from services.recorder.unwinding.demangling import Demangler


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN3app1A2goEPi", "app::A::go(int*)"),
        ("_ZN2os5abortEbPvPKv.cold", "os::abort(bool, void*, void const*) [clone .cold]"),
        ("_ZN3app5parse17h0123456789abcdefE", "app::parse::h0123456789abcdef"),
        (
            "_ZN35_$LT$app..A$u20$as$u20$app..Run$GT$2go17h0123456789abcdefE",
            "<app::A as app::Run>::go::h0123456789abcdef",
        ),
        (
            "_ZN3app4main28_$u7b$$u7b$closure$u7d$$u7d$17h0123456789abcdefE",
            "app::main::{{closure}}::h0123456789abcdef",
        ),
        ("main", None),
        ("_Znot", None),
        ("_Z", None),
        ("_ZN3app\udc80", None),
    ],
)
def test_name_is_that_of_the_source(symbol: str, name: str | None) -> None:
    assert Demangler().readable(symbol) == name


def bomb(doublings: int) -> str:
    """Return a symbol whose name has twice as many characters with each of its parameters."""
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return "_Z1fSt4pairIiiE" + "".join(f"S_IS{n}_S{n}_E" for n in digits[:doublings])


@pytest.mark.parametrize("symbol", [bomb(36), "_Z1fIJ" + "i" * 999 + "EEv" + "Dp" * 9 + "T_"])
def test_symbol_that_would_be_gigabytes_stays_as_it_is(symbol: str) -> None:
    assert Demangler().readable(symbol) is None


def test_references_of_a_hostile_symbol_are_counted_in_no_long_time() -> None:
    began = time.process_time()
    for n in range(200):
        assert Demangler().readable(f"_Z{'S' * 4000}{n}") is None
    assert time.process_time() - began < 1


# Not longer than 1024: libstdc++ demangles no such symbol. A reference repeats what is long.
LONG = f"N400{'x' * 400}400{'y' * 400}E"


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (bomb(6), "f"),
        (f"_ZN3app3MapI{LONG}S2_E4findEv", "app::Map::find"),
        (f"_ZN3app4findI{LONG}EE3BoxIT_S3_EPS3_", "app::find"),
        (f"_RNvMs_NtCs1_3app3mapINtB4_3MapNtB4_1200_{'x' * 1200}E2at", "app::map::Map::at"),
    ],
    ids=["parameters", "class", "result", "rust"],
)
def test_name_that_is_too_long_is_told_without_arguments(symbol: str, name: str) -> None:
    assert Demangler().readable(symbol) == name


def test_name_without_arguments_is_cut() -> None:
    symbol = f"_RNvNvC1a1200{'x' * 1200}1b"
    assert Demangler().readable(symbol) == "a::".ljust(MAX_TEXT, "x")


def test_no_symbol_is_looked_at_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demangling, "_SECONDS", 0.0)

    assert Demangler().readable("_Z1fi") is None
