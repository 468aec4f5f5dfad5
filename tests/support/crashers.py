"""Real programs that crash, one fault each, compiled once per test session.

Each faults in a function named ``crash_here``, so that a backtrace can be checked.
"""

import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.support.requirements import need_program

SOURCES = Path(__file__).with_name("crashers")

# What dies by itself, and the signal it dies of.
FATAL = {
    "null_pointer": "SIGSEGV",
    "bus_error": "SIGBUS",
    "division_by_zero": "SIGFPE",
    "illegal_instruction": "SIGILL",
    "abort": "SIGABRT",
    "stack_overflow": "SIGSEGV",
    "threads": "SIGSEGV",
}

# Fills so many MiB, given as its argument, and crashes.
_HOG = """
import ctypes, mmap, sys
size = int(sys.argv[1]) << 20
memory = mmap.mmap(-1, size)
memory.write(b"\\xa5" * size)
ctypes.string_at(0)
"""
HOG = ("/usr/bin/python3", "-c", _HOG)


def crasher(name: str) -> Path:
    """Return the program made of ``crashers/<name>.c``."""
    program = _build_directory() / name
    if not program.exists():
        library: list[str | Path] = (
            [_libscope(), "-Wl,-rpath,$ORIGIN"] if "libscope" in name else []
        )
        _compile(SOURCES / f"{name}.c", program, *library, "-pthread")
    return program


def _libscope() -> Path:
    library = _build_directory() / "libscope.so"
    if not library.exists():
        _compile(SOURCES / "libscope.c", library, "-shared", "-fPIC")
    return library


def _compile(source: Path, program: Path, *options: str | Path) -> None:
    need_program("gcc")
    command = [
        "gcc",
        "-g",
        "-O0",
        "-Wall",
        "-Wno-infinite-recursion",
        "-o",
        program,
        source,
        *options,
    ]
    subprocess.run(command, check=True)


@cache
def _build() -> tempfile.TemporaryDirectory[str]:
    """The cache keeps it for the session; Python removes it at the end."""
    return tempfile.TemporaryDirectory(prefix="crashers-")


def _build_directory() -> Path:
    directory = Path(_build().name)
    directory.chmod(0o755)  # a test may run them as another user
    return directory
