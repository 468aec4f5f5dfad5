"""A program as packages have it: its debug information apart, in two files."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from services.recorder.unwinding import debug_files
from tests.support.requirements import need_program

# Enough of the same types in two programs for dwz(1) to put them into a file of their own.
_SOURCE = """
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
FILE *file;
pthread_attr_t attributes;
struct sigaction action;
__attribute__((noinline)) int crash_here(volatile int *at) { return *at + NUMBER; }
int main(void) { return crash_here(0); }
"""


@dataclass(frozen=True)
class Packaged:
    """Its files.

    Attributes:
        program: without symbols.
        debug: its debug information, which is of no use without `common`.
        common: what dwz(1) found in another program, too.
    """

    program: Path
    debug: Path
    common: Path

    @property
    def build_id(self) -> str:
        return _build_id(self.program)

    @property
    def common_id(self) -> str:
        return _build_id(self.common)


def packaged(directory: Path, name: str = "/nowhere/.dwz/some/common.debug") -> Packaged:
    """Make one.

    Args:
        name: by which the debug information refers to what is common.
    """
    for program in ("gcc", "dwz", "objcopy", "strip"):
        need_program(program)
    directory.mkdir()
    (directory / "bug.c").write_text(_SOURCE)
    programs = [directory / one for one in ("program", "other")]
    debugs = [directory / f"{program.name}.debug" for program in programs]
    for number, (made, debug) in enumerate(zip(programs, debugs, strict=True)):
        options = ("-g", "-O0", f"-DNUMBER={number}", "-o", made)
        subprocess.run(["gcc", *options, directory / "bug.c"], check=True)
        subprocess.run(["objcopy", "--only-keep-debug", made, debug], check=True)
        subprocess.run(["strip", made], check=True)
    common = directory / "common.debug"
    subprocess.run(["dwz", "-m", common, "-M", name, *debugs], check=True)
    return Packaged(programs[0], debugs[0], common)


def lay_down(file: Path, place: Path) -> None:
    """Copy a file to where its debug directory has it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, place)


def _build_id(path: Path) -> str:
    with path.open("rb") as file:
        found = debug_files.build_id_of(file.fileno())
    assert found
    return found
