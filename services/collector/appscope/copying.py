"""A file that is copied while its writer may still change it; its holes stay holes."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from crashbus.layout import LARGE, Kind
from services.common import crash_directory

_BLOCK = 256 * 1024  # bytes; as many processes as are watched may be copied at a time


@dataclass(frozen=True)
class Copied:
    """A copy of a file.

    Attributes:
        size: bytes of the copy.
        whole: bytes of the file, as it was at the beginning.
        error: what ended the copying too early.
        shrank: whether the file was cut meanwhile.
    """

    size: int
    whole: int
    error: OSError | None
    shrank: bool

    def why(self, kind: Kind) -> str:
        """Tell why the copy is shorter than the file."""
        if self.error is not None:
            return f"{self.error.strerror}"
        if self.shrank:
            return "where its writer cut it meanwhile"
        return "for want of room" if kind in LARGE else "as many as are read of its kind"


def copy(
    source: int, directory: int, kind: Kind, epoch: int, most: int, step: Callable[[], None]
) -> Copied:
    """Copy what a file holds, up to `most` bytes of data; its holes stay holes.

    Args:
        step: called whenever some of it was copied.

    Raises:
        OSError: the copy cannot be made at all.
    """
    target = crash_directory.create_file(directory, kind, epoch)
    whole = os.fstat(source).st_size
    try:
        size = _copy_data(source, target, whole, most, step)
        now = os.fstat(source).st_size
        os.ftruncate(target, min(size, now))
        return Copied(min(size, now), whole, None, now < whole)
    except OSError as error:
        return Copied(os.fstat(target).st_size, whole, error, False)
    finally:
        os.close(target)


def _copy_data(source: int, target: int, whole: int, most: int, step: Callable[[], None]) -> int:
    """Copy up to `most` bytes of data and return where the copy ends."""
    position = 0
    while (start := _data_from(source, position, whole)) < whole and most > 0:
        end = min(os.lseek(source, start, os.SEEK_HOLE), whole, start + most)
        position = _copy_range(source, target, start, end, step)
        most -= end - start
    return start


def size_on_disk(file: int) -> int:
    """Return how many bytes the data of a file takes, its holes left out."""
    status = os.fstat(file)
    return min(status.st_size, status.st_blocks * 512)


def _data_from(source: int, position: int, size: int) -> int:
    """Return where a file's data goes on; its size where there is only a hole left."""
    try:
        return min(os.lseek(source, position, os.SEEK_DATA), size)
    except OSError as error:
        if error.errno != errno.ENXIO:  # lseek(2)
            raise
        return size


def _copy_range(source: int, target: int, start: int, end: int, step: Callable[[], None]) -> int:
    while start < end:
        block = os.pread(source, min(_BLOCK, end - start), start)
        if not block:
            break
        view = memoryview(block)
        while view:
            written = os.pwrite(target, view, start)
            view, start = view[written:], start + written
            step()
    return end
