"""The kernel's version decides how cores come."""

from pathlib import Path

import pytest

from services.recorder.errors import RecorderError
from services.recorder.handover import mechanism
from services.recorder.handover.mechanism import Mechanism, Plan

SOCKET, HELPER = Path("/run/crashbus/coredump.sock"), Path("/var/lib/crashbus/recorder/corepipe")


@pytest.mark.parametrize(
    ("wanted", "version", "chosen"),
    [
        ("auto", (6, 18), Mechanism.SOCKET_REQUEST),
        ("auto", (7, 0), Mechanism.SOCKET_REQUEST),
        ("auto", (6, 16), Mechanism.SOCKET),
        ("auto", (6, 15), Mechanism.PIPE),
        ("auto", (5, 8), Mechanism.PIPE),
        ("pipe", (6, 18), Mechanism.PIPE),
        ("socket", (6, 17), Mechanism.SOCKET_REQUEST),
    ],
)
def test_choice(wanted: str, version: tuple[int, int], chosen: Mechanism) -> None:
    assert mechanism.choose(wanted, version) is chosen  # type: ignore[arg-type]


def test_socket_on_an_old_kernel_is_refused_with_a_mend() -> None:
    with pytest.raises(RecorderError, match=r"needs Linux 6\.16, this is 6\.1: set CRASHBUS"):
        mechanism.choose("socket", (6, 1))


@pytest.mark.parametrize(
    ("release", "version"), [("6.18.44-cloud", (6, 18)), ("5.10.0", (5, 10)), ("7.1-rc1", (7, 1))]
)
def test_release(release: str, version: tuple[int, int]) -> None:
    assert mechanism.kernel_version(release) == version


@pytest.mark.parametrize(
    ("chosen", "pattern"),
    [
        (Mechanism.SOCKET_REQUEST, "@@/run/crashbus/coredump.sock"),
        (Mechanism.SOCKET, "@/run/crashbus/coredump.sock"),
    ],
)
def test_helper_that_asks_nobody_stands_in_for_a_socket(chosen: Mechanism, pattern: str) -> None:
    stand_in = "|/var/lib/crashbus/recorder/corepipe - %P %I %s %t"

    assert mechanism.plan(chosen, SOCKET, HELPER) == Plan(chosen, pattern, stand_in)


def test_helper_that_asks_the_recorder_stands_in_for_itself() -> None:
    pattern = "|/var/lib/crashbus/recorder/corepipe /run/crashbus/coredump.sock %P %I %s %t"

    assert mechanism.plan(Mechanism.PIPE, SOCKET, HELPER) == Plan(Mechanism.PIPE, pattern, pattern)


def test_nothing_stands_in_for_a_socket_where_the_helper_has_too_long_a_path() -> None:
    plan = mechanism.plan(Mechanism.SOCKET, SOCKET, Path("/" + "y" * 120))

    assert plan == Plan(Mechanism.SOCKET, f"@{SOCKET}", None)


@pytest.mark.parametrize(
    "socket", [Path("relative"), Path("/with space"), Path("/with%p"), Path("/" + "x" * 107)]
)
def test_path_that_core_pattern_cannot_hold_is_refused(socket: Path) -> None:
    with pytest.raises(RecorderError):
        mechanism.plan(Mechanism.PIPE, socket, HELPER)


def test_pattern_that_is_too_long_is_refused() -> None:
    with pytest.raises(RecorderError, match="core_pattern holds 127 bytes"):
        mechanism.plan(Mechanism.PIPE, Path("/" + "x" * 60), Path("/" + "y" * 60))


@pytest.mark.parametrize(
    ("pattern", "owner"),
    [
        ("|/usr/lib/systemd/systemd-coredump %P %u", "systemd-coredump"),
        ("|/usr/share/apport/apport -p%p", "apport"),
        ("|/var/lib/x/corepipe - %P %I", "corepipe, which keeps them for the next recorder"),
        ("|/var/lib/x/corepipe /run/s %P %I", "corepipe"),
        ("@@/run/x.sock", "the coredump socket /run/x.sock"),
        ("core", "the kernel itself, as files named 'core'"),
        ("", "nobody"),
    ],
)
def test_owner(pattern: str, owner: str) -> None:
    assert mechanism.owner(pattern) == owner
