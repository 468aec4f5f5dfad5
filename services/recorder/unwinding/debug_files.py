"""Separate debug information in directories of the form that gdb and drgn know.

A file of it may refer to a supplement, in which dwz(1) put what the debug files of a package have
in common; without it neither gdb nor drgn reads the rest.
https://sourceware.org/gdb/current/onlinedocs/gdb.html/Separate-Debug-Files.html
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from crashbus import elf, names
from services.recorder.unwinding.sections import sections_of

_LINK, _NOTE = b".gnu_debugaltlink", b".note.gnu.build-id"
_LONGEST = 4096  # bytes of either; a link is a path and a build ID
_IDS = range(2, 65)  # bytes of a build ID
_SHARED = ".dwz"  # directory in which Debian and others keep supplements by name


@dataclass(frozen=True)
class Link:
    """What a debug file says of its supplement.

    Attributes:
        name: path by which it does.
    """

    name: str
    build_id: str


def build_id_of(file: int) -> str | None:
    """Return a file's build ID: a supplement has no program headers to find it by."""
    return elf.build_id(file) or elf.noted([_section(file, _NOTE)])


def link_of(file: int) -> Link | None:
    """Return what a debug file refers to; None: it needs no other."""
    name, _, build_id = _section(file, _LINK).partition(b"\0")
    return Link(names.text(name), build_id.hex()) if len(build_id) in _IDS else None


def _section(file: int, name: bytes) -> bytes:
    _, offset, size = sections_of(file).get(name, (0, 0, 0))
    try:
        return os.pread(file, min(size, _LONGEST), offset)
    except (OSError, OverflowError):
        return b""


def path_of(directory: Path, build_id: str) -> Path:
    """Return where a directory has the debug information of a build."""
    return directory / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"


def opened(directories: Iterable[Path], build_id: str) -> AbstractContextManager[int]:
    """Open the debug information of a build; -1 where there is none."""
    return _first(path_of(directory, build_id) for directory in directories)


def opened_supplement(directories: Sequence[Path], wanted: Link) -> AbstractContextManager[int]:
    """Open a supplement, by build ID or by name; -1 where it is not.

    Its name was written by whoever built a program: none but files of these directories are looked
    at, and none of another build is taken.
    """
    _, is_shared, name = wanted.name.rpartition(f"/{_SHARED}/")
    by_name = is_shared and not {"", ".", ".."} & set(name.split("/"))
    paths = [path_of(directory, wanted.build_id) for directory in directories]
    paths += [directory / _SHARED / name for directory in directories if by_name]
    return _first(paths, wanted.build_id)


@contextmanager
def _first(paths: Iterable[Path], build_id: str | None = None) -> Iterator[int]:
    """Open the first that is there, and of this build."""
    for path in paths:
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if build_id is None or build_id_of(file) == build_id:
                yield file
                return
        finally:
            os.close(file)
    yield -1
