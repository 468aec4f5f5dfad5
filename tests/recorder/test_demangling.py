"""Names of C++ and Rust in a backtrace."""

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


def test_name_is_cut() -> None:
    name = Demangler().readable(bomb(6))
    assert name is not None
    assert name.startswith("f(std::pair<int, int>, std::pair<std::pair<int, int>")
    assert len(name) == MAX_TEXT


def test_no_symbol_is_looked_at_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demangling, "_SECONDS", 0.0)

    assert Demangler().readable("_Z1fi") is None
