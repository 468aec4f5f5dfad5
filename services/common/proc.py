"""Reading /proc: now, or once, so that what was read outlives the process.

A process is held for as long as we read, so this is written for speed: a pathlib path costs more
than the kernel needs for most of these files.
"""

import os
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

MAX_READ = 64 * 1024  # bytes, of most files
_FLAGS = os.O_RDONLY | os.O_CLOEXEC
_AT_ONCE = 64 * 1024  # bytes


def read_file(path: str | os.PathLike[str], limit: int = MAX_READ, at: int | None = None) -> bytes:
    """Read up to `limit` bytes; what cannot be read is empty. /proc gives a page at a time.

    Args:
        at: descriptor of the directory that the path begins in.
    """
    try:
        file = os.open(path, _FLAGS, dir_fd=at)
    except OSError:
        return b""
    parts, left = [], limit
    try:
        while left > 0 and (part := os.read(file, min(left, _AT_ONCE))):
            parts.append(part)
            left -= len(part)
    except OSError:
        return b""
    finally:
        os.close(file)
    return b"".join(parts)


class Mapping(NamedTuple):
    """A line of proc_pid_maps(5).

    Attributes:
        device: as the file has it, ``fe:00``.
        path: empty for memory without a name.
    """

    start: int
    end: int
    access: bytes
    offset: int
    device: bytes
    inode: bytes
    path: bytes

    @property
    def is_code(self) -> bool:
        """Whether it may be executed."""
        return b"x" in self.access


def lines(raw: bytes) -> list[bytes]:
    """Return the lines of a file in /proc that have anything in them.

    The kernel escapes in names what ends its lines, the line feed. `splitlines` sees more ends:
    whoever names a file or a process could make lines of their own.
    """
    return [line for line in raw.split(b"\n") if line]


def mappings(maps: bytes) -> Iterator[Mapping]:
    """Give what proc_pid_maps(5) tells; a line that is cut off, or damaged on disk, is left out."""
    for line in lines(maps):
        parts = line.split(maxsplit=5)
        try:
            low, high = parts[0].split(b"-")
            start, end, offset = int(low, 16), int(high, 16), int(parts[2], 16)
            path = parts[5] if len(parts) > 5 else b""
            yield Mapping(start, end, parts[1], offset, parts[3], parts[4], path)
        except (ValueError, IndexError):
            continue


class Proc:
    """/proc as it is now. Names are relative to it: ``1234/status``."""

    def read(self, name: str, limit: int = MAX_READ) -> bytes:
        """Return up to `limit` bytes of a file; empty where it cannot be read."""
        return read_file(f"/proc/{name}", limit)

    def link(self, name: str) -> bytes | None:
        """Return where a link leads; None where that cannot be told."""
        try:
            return os.readlink(f"/proc/{name}".encode())  # noqa: PTH115 - may not be UTF-8
        except OSError:
            return None

    def list(self, name: str, limit: int) -> list[str]:
        """Return the first names in a directory; none where it cannot be read."""
        try:
            with os.scandir(f"/proc/{name}") as entries:
                return [entry.name for entry in islice(entries, limit)]
        except OSError:
            return []


class Remembered(Proc):
    """What was read of one process, each name once.

    After `seal` what was not read is not there: its PID may be another's by then.
    """

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._links: dict[str, bytes | None] = {}
        self._lists: dict[str, list[str]] = {}
        self._sealed = False

    def seal(self) -> None:
        """Read nothing more."""
        self._sealed = True

    def learn(self, name: str, content: bytes) -> None:
        """Take in what a file has, known from elsewhere."""
        self._files[name] = content

    def learn_link(self, name: str, target: bytes | None) -> None:
        """Take in where a link leads."""
        self._links[name] = target

    def learn_list(self, name: str, entries: "list[str]") -> None:
        """Take in what is in a directory."""
        self._lists[name] = entries

    def forget(self, name: str) -> None:
        """Drop a file that is not needed again."""
        self._files.pop(name, None)

    def read(self, name: str, limit: int = MAX_READ) -> bytes:
        """As `Proc.read`; the first limit counts."""
        if name not in self._files:
            self._files[name] = b"" if self._sealed else super().read(name, limit)
        return self._files[name]

    def link(self, name: str) -> bytes | None:
        """As `Proc.link`."""
        if name not in self._links:
            self._links[name] = None if self._sealed else super().link(name)
        return self._links[name]

    def list(self, name: str, limit: int) -> "list[str]":
        """As `Proc.list`; the first limit counts."""
        if name not in self._lists:
            self._lists[name] = [] if self._sealed else super().list(name, limit)
        return self._lists[name]


LIVE = Proc()
