"""What a process has mapped as code, and the files themselves.

Sources: proc_pid_maps(5), proc_pid_map_files(5).
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from crashbus import names
from services.common.proc import mappings
from services.recorder.file_systems import is_local

MAX_MODULES = 1024
_FILES_LATER = 64  # opened of a process that is gone

Identity = tuple[int, int]  # device and inode of a file


@dataclass(frozen=True)
class Module:
    """A file that is mapped as code.

    Attributes:
        start: lowest address at which the file is mapped.
        end: highest address, exclusive.
        file: open descriptor of the very file, wherever its path leads; -1: not opened.
        is_local: of its file a read ends. Found out when it is opened, by a thread that may wait.
    """

    path: str
    start: int
    end: int
    file: int = -1
    is_local: bool = False


def opened_module(path: str, start: int, end: int, file: int) -> Module:
    """Return a module whose file was opened just now; -1: it could not be."""
    return Module(path, start, end, file, file >= 0 and is_local(file))


@dataclass
class _Mapped:
    """The mappings of one file: where the first lies, and the end of the last, in hexadecimal."""

    start: bytes
    first_end: bytes
    end: bytes
    code: bool = False

    def told(self, path: bytes) -> tuple[str, int, int, str]:
        """Return what `parse_maps` does; map_files has no leading zeros, unlike maps."""
        start = int(self.start, 16)
        first = f"{start:x}-{int(self.first_end, 16):x}"
        return names.text(path), start, int(self.end, 16), first


# Lines of files, as proc_pid_maps(5) has them, one match for each; there may be 65,530 mappings and
# more, most of them memory, which is gone over without a match of its own: its inode is 0. (No
# group is possessive: Python before 3.11.5 gets that wrong.)
_FILE_MAPPING = re.compile(
    rb"(?:[^ \n]++ [^ \n]++ [^ \n]++ [^ \n]++ 0(?: [^\n]*+)?\n)*"
    rb"(?:([0-9a-f]++)-([0-9a-f]++) [r-][w-]([x-])[ps] [0-9a-f]++ "
    rb"([0-9a-f]++:[0-9a-f]++ [1-9][0-9]*+) ++([^\n]++)|[^\n]*+)\n?"
)


def parse_maps(raw: bytes) -> list[tuple[str, int, int, str]]:
    """Return path, start, end and the name in map_files of each file that is mapped as code.

    Args:
        raw: /proc/<pid>/maps, or its beginning, in the order of addresses.
    """
    files: dict[tuple[bytes, bytes], _Mapped] = {}
    for start, end, code, identity, path in _FILE_MAPPING.findall(raw):
        if not path:
            continue
        mapped = files.get((identity, path))
        if mapped is None:
            mapped = files[identity, path] = _Mapped(start, end, end)
        mapped.end = end
        mapped.code = mapped.code or code == b"x"
    found = (one.told(path) for (_, path), one in files.items() if one.code)
    return list(islice(found, MAX_MODULES))


def read(
    task: int, maps: bytes, limit: int, opened: Mapping[str, int] | None = None
) -> tuple[Module, ...]:
    """Return the modules of a process, their files open, which path, root and deletion cannot hide.

    The last to be done: a file system that does not answer keeps us here.

    Args:
        task: a thread that still has its memory, as a name in /proc.
        maps: as for `parse_maps`.
        limit: how many files may be opened.
        opened: what `open_files` returned, if they are open already; what is of no use is closed.
    """
    unused = dict(open_files(task, maps, limit) if opened is None else opened)
    try:
        return tuple(
            opened_module(path, start, end, unused.pop(name, -1))
            for path, start, end, name in parse_maps(maps)
        )
    finally:
        for file in unused.values():
            close(file)


def close(file: int) -> None:
    """Close a module's file; its file system is told, and may say what it likes: close(2)."""
    with suppress(OSError):
        os.close(file)


def open_files(task: int, maps: bytes, limit: int) -> dict[str, int]:
    """Open the first files that are mapped as code, by name in proc_pid_map_files(5)."""
    opened: dict[str, int] = {}
    for *_, mapping in parse_maps(maps):
        if len(opened) >= limit:
            break
        file = open_mapping(task, mapping)
        if file >= 0:
            opened[mapping] = file
    return opened


def open_mapping(task: int, mapping: str) -> int:
    """Open a mapped file by its name in proc_pid_map_files(5); -1 where that cannot be."""
    path = f"/proc/{task}/map_files/{mapping}"
    try:
        # To open a device is to act on it: look first. What is mapped stays while it is held.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - fast, see services.common.proc
            return -1
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return -1


def read_later(maps: bytes) -> tuple[Module, ...]:
    """Return what a process that is gone had mapped as code.

    A file is opened where the very same one still has its path here.
    """
    places: dict[str, tuple[bytes, bytes]] = {}
    for one in mappings(maps):
        places.setdefault(names.text(one.path), (one.device, one.inode))
    found, files = [], 0
    for path, start, end, _ in parse_maps(maps):
        # Where a line is damaged, the two may not read the same in it.
        place = places.get(path) if files < _FILES_LATER else None
        identity = _identity(*place) if place else None
        opened = _same_file(path, identity) if identity else -1
        files += opened >= 0
        found.append(opened_module(path, start, end, opened))
    return tuple(found)


def opened_again(
    mapped: Sequence[Module], identities: Sequence[Identity | None]
) -> tuple[Module, ...]:
    """Return modules with their files open where the very same one still has its path here."""
    return tuple(
        opened_module(
            module.path,
            module.start,
            module.end,
            _same_file(module.path, identity) if identity else -1,
        )
        for module, identity in zip(mapped, identities, strict=False)
    )


def _identity(device: bytes, inode: bytes) -> Identity | None:
    """Return what a line of the mappings tells; None where it is damaged."""
    major, _, minor = device.partition(b":")
    try:
        return os.makedev(int(major, 16), int(minor, 16)), int(inode)
    except (ValueError, OverflowError):  # no such device can be
        return None


def _same_file(path: str, identity: Identity) -> int:
    """Open a file if it is the one with this device and inode; -1 if not."""
    try:
        if not _is(Path(path).stat(), identity):
            return -1
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError):  # a NUL in the path
        return -1
    with suppress(OSError):
        if _is(os.fstat(opened), identity):
            return opened
    os.close(opened)
    return -1


def _is(status: os.stat_result, identity: Identity) -> bool:
    return stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) == identity
