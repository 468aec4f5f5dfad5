"""What the images are made of is there for arm64, too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

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


@pytest.mark.parametrize(
    ("directory", "kind"), [("helper", ("-static", "-pthread")), ("taker", ("-shared", "-fPIC"))]
)
def test_what_is_c_compiles(tmp_path: Path, directory: str, kind: tuple[str, ...]) -> None:
    need_program("aarch64-linux-gnu-gcc")
    program = tmp_path / directory
    options = (*kind, "-O2", "-Wall", "-Wextra", "-Werror", "-o", program)

    subprocess.run(
        ["aarch64-linux-gnu-gcc", *options, *(RECORDER / directory).glob("*.c")], check=True
    )

    assert program.read_bytes()[18] == 183  # e_machine, elf(5): EM_AARCH64
