"""A small disk of a test's own: a file system in a file, which can be filled up."""

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from tests.support.requirements import need_program, need_root

_BLOCK = 4096  # bytes


class SmallDisk:
    """A mounted file system.

    Attributes:
        place: where it is mounted.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._ballast = place / "ballast"

    def fill(self, leaving: int = 0) -> None:
        """Take its room but for so many bytes."""
        status = os.statvfs(self.place)
        wanted = status.f_bavail * status.f_frsize - leaving
        with self._ballast.open("ab") as file:
            size = os.fstat(file.fileno()).st_size
            part = wanted
            while min(part, wanted) >= _BLOCK:
                part = min(part, wanted)
                try:
                    os.posix_fallocate(file.fileno(), size, part)
                except OSError:  # it needs some blocks for itself
                    part //= 2
                else:
                    size, wanted = size + part, wanted - part
            if not leaving:
                with suppress(OSError):
                    while True:
                        os.write(file.fileno(), bytes(_BLOCK))

    def take_inodes(self, leaving: int) -> None:
        """Leave so many files that can still be made; once more, if others made some."""
        taken = self.place / "inodes"
        taken.mkdir(exist_ok=True)
        with suppress(OSError):
            while True:
                (taken / secrets.token_hex(8)).touch()
        for file in islice(taken.iterdir(), leaving):
            file.unlink()

    def empty(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Let everyone who writes there wait, fsfreeze(8)."""
        subprocess.run(["fsfreeze", "--freeze", self.place], check=True)
        try:
            yield
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", self.place], check=True)


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Let nobody write to a file, not even who has it open, chattr(1)."""
    need_program("chattr")
    subprocess.run(["chattr", "+i", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@contextmanager
def tmpfs(place: Path, options: str) -> Iterator[Path]:
    """Mount a file system in memory, with tmpfs(5)'s options, on a directory, made if missing."""
    need_root()
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def small_disk(place: Path, mib: int) -> Iterator[SmallDisk]:
    """Mount a file system of so many MiB on a directory, which is made."""
    need_root()
    need_program("mkfs.ext4")
    image = place.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(mib * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image], check=True)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield SmallDisk(place)
    finally:
        # A process that was just ended may not be quite gone.
        subprocess.run(["umount", "--lazy", place], check=True)
        image.unlink()
