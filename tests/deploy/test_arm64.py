"""What the images are made of is there for arm64, too."""

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from services.recorder.taker.taker_library import Crash, Greeted
from tests.recorder.test_helper import me, recorder, rules
from tests.support.requirements import need_program

ROOT = Path(__file__).parents[2]
RECORDER = ROOT / "services" / "recorder"
# Made from their sources when the images are built: nkeys is Python alone, and drgn finds there
# what it takes.
FROM_SOURCES = {"drgn", "nkeys"}
# Of Debian 12: its C library and all before it, PEP 600.
PLATFORMS = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 37))]


def locked() -> list[Requirement]:
    """Return what the lock file names for Linux on arm64."""
    environment = {**default_environment(), "platform_machine": "aarch64"}
    lines = re.findall(r"^([a-z].*?) *\\$", (ROOT / "requirements.lock").read_text(), re.M)
    found = map(Requirement, lines)
    return [one for one in found if not one.marker or one.marker.evaluate(environment)]  # type: ignore[arg-type]


def test_each_locked_package_has_a_wheel_or_is_built(tmp_path: Path) -> None:
    wheels = tmp_path / "requirements.txt"
    wanted = [one for one in locked() if one.name not in FROM_SOURCES]
    wheels.write_text("".join(f"{one.name}{one.specifier}\n" for one in wanted))
    python = ("--python-version", "3.11", "--implementation", "cp")
    abis = (part for abi in ("cp311", "abi3", "none") for part in ("--abi", abi))
    platforms = (part for one in PLATFORMS for part in ("--platform", one))

    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"),
            *("--no-deps", "--only-binary", ":all:", *python, *abis, *platforms),
            *("--target", tmp_path / "nothing", "--requirement", wheels),
        ],
        capture_output=True,
        text=True,
    )

    assert len(wanted) > 30
    assert done.returncode == 0, done.stderr


def compiled(program: Path, sources: Iterable[Path], *options: str) -> Path:
    need_program("aarch64-linux-gnu-gcc")
    warnings = ("-O2", "-Wall", "-Wextra", "-Werror")
    arguments = (*options, *warnings, "-o", program, *sources)
    subprocess.run(["aarch64-linux-gnu-gcc", *map(str, arguments)], check=True)
    assert program.read_bytes()[18] == 183  # e_machine, elf(5): EM_AARCH64
    return program


def run(*command: str | Path, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    """Run a program for arm64."""
    emulator = need_program("qemu-aarch64")
    return subprocess.run([emulator, *command], input=given, capture_output=True, timeout=60)


@pytest.fixture
def helper(tmp_path: Path) -> Path:
    """The pipe helper; no C library for arm64 is at hand when it runs."""
    sources = (RECORDER / "helper").glob("*.c")
    return compiled(tmp_path / "corepipe", sources, "-static", "-pthread")


def test_pipe_helper_hands_a_crash_over(helper: Path, tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    with recorder(socket, lambda _: None):
        done = run(helper, *me(str(socket)), given=b"core")

    assert done.returncode == 0, done.stderr


def test_pipe_helper_keeps_a_crash_without_a_recorder(helper: Path, tmp_path: Path) -> None:
    orphans = tmp_path / "orphans"
    orphans.mkdir(mode=0o700)
    rules(helper, orphans)

    done = run(helper, *me(), given=b"core")

    assert done.returncode == 0, done.stderr
    (kept,) = orphans.iterdir()
    assert (kept / "core").read_bytes() == b"core"


LOADS_TAKER = """
#include <dlfcn.h>
#include <stdio.h>
int main(int count, char **words) {
    void *library = dlopen(words[count - 1], RTLD_NOW);
    if (!library) return puts(dlerror());
    printf("%zu", ((size_t (*)(void))dlsym(library, "known_size"))());
    return 0;
}
"""


def test_taker_loads_and_has_the_layout_that_python_knows(tmp_path: Path) -> None:
    taker = compiled(tmp_path / "taker.so", (RECORDER / "taker").glob("*.c"), "-shared", "-fPIC")
    (tmp_path / "loads.c").write_text(LOADS_TAKER)
    loads = compiled(tmp_path / "loads", [tmp_path / "loads.c"])

    done = run("-L", "/usr/aarch64-linux-gnu", loads, taker)

    assert done.stdout == str(ctypes.sizeof(Crash) + ctypes.sizeof(Greeted)).encode(), done.stdout
