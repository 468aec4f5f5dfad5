"""Destination ``file:///path``: files below a directory.

A file appears under its name only when it is whole, verified and on the disk. Below the base
directory no symbolic link is followed: another user of the directory cannot lead us elsewhere.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path

from crashbus import names
from crashbus.parts import CrashFile
from services.shipper.destinations.base import Deliverer
from services.shipper.failure import Failure, Final, Passing, Unfit
from services.shipper.source import Source
from services.shipper.threads import run_whole

DIRECTORY_MODE = 0o750
FILE_MODE = 0o640  # core dumps hold secrets
TEMPORARY = ".crashbus-"
READ_SIZE = 1024 * 1024

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FOUND = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # it may be a pipe
# How a file system says that it has no hard links, link(2).
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)

# What may not pass by itself, and what may: reason and mend, by error number.
FINAL = {
    errno.EACCES: ("permission_denied", "give the shipper's user the right to write there"),
    errno.EPERM: ("permission_denied", "give the shipper's user the right to write there"),
    errno.EROFS: ("read_only", "mount the file system for writing"),
    errno.ELOOP: ("not_a_directory", "remove the symbolic link below the destination"),
    errno.ENOTDIR: ("not_a_directory", "remove what lies where a directory should be"),
    errno.EEXIST: ("not_a_directory", "remove what lies where a directory should be"),
    errno.EISDIR: ("is_a_directory", "remove the directory that lies where the file should be"),
    errno.ENAMETOOLONG: ("name_too_long", "use a file system that takes longer names"),
    errno.EFBIG: ("file_too_large", "use a file system that takes larger files"),
}
PASSING = {
    errno.ENOSPC: ("disk_full", "make room on the destination's file system"),
    errno.EDQUOT: ("quota_exceeded", "raise the quota on the destination's file system"),
}


class FileDeliverer(Deliverer):
    """Delivers into a directory; makes it if it is not there."""

    async def check(self) -> None:
        with _as_failure(self.destination.path):
            upload = Upload(self.destination.path, "")
            try:
                await run_whole(upload.open)
            finally:
                await run_whole(upload.close)

    async def deliver(self, folder: str, sources: Sequence[Source]) -> None:
        for source in sources:
            self._check_names(folder, source.file)
            with _as_failure(f"{self.destination.path}/{folder}/{source.file.stored_name}"):
                await self._deliver(folder, source)

    async def _deliver(self, folder: str, source: Source) -> None:
        upload = Upload(self.destination.path, folder)
        try:
            await run_whole(upload.open)
            async with aclosing(source.pieces()) as pieces:
                async for piece in pieces:
                    await run_whole(upload.write, piece.stored)
            name = upload.take if source.file.only_if_free else upload.replace
            await run_whole(name, source.file.stored_name)
        finally:
            await run_whole(upload.close)

    async def sha256_of(self, folder: str, name: str) -> str | None:
        place = Path(self.destination.path) / folder / name
        with _as_failure(str(place)):
            return await run_whole(_sha256_at, self.destination.path, folder, name)

    def _check_names(self, folder: str, file: CrashFile) -> None:
        for step in (*folder.split("/"), file.stored_name):
            if not names.is_file_name(step):
                mend = "shorten the name of the host or of the file"
                raise Unfit(file, "name_too_long", f"no file can be called {step[:300]!r}", mend)

    def url_of(self, folder: str, file: CrashFile) -> str:
        return (Path(self.destination.path) / folder / file.stored_name).as_uri()


class Upload:
    """One file on its way to its name. `close` takes back what was not completed.

    Args:
        base: the destination's directory.
        folder: relative to it; made if it is not there.
    """

    def __init__(self, base: str, folder: str) -> None:
        self._base = base
        self._folder = folder
        self._name = f"{TEMPORARY}{secrets.token_hex(8)}"
        self._directory = -1
        self._file = -1
        self._hash = hashlib.sha256()
        self._size = 0

    def open(self) -> None:
        """Make the directories and a file without its final name."""
        self._directory = _make_directories(self._base, self._folder)
        self._file = os.open(self._name, _OPEN_NEW, FILE_MODE, dir_fd=self._directory)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_abandoned(self._directory)

    def write(self, data: bytes) -> None:
        """Append data."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        self._hash.update(data)
        self._size += len(data)

    def replace(self, name: str) -> None:
        """Verify what was written, give it its name, and have both on the disk."""
        self._verify()
        os.rename(self._name, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._name = ""
        os.fsync(self._directory)

    def take(self, name: str) -> None:
        """Do the same with a name that must be free, and may have been given meanwhile."""
        self._verify()
        here = {"src_dir_fd": self._directory, "dst_dir_fd": self._directory}
        try:
            os.link(self._name, name, **here, follow_symlinks=False)
        except FileExistsError:
            raise _name_taken(name) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with suppress(FileNotFoundError):
                os.stat(name, dir_fd=self._directory, follow_symlinks=False)
                raise _name_taken(name) from None
            self.replace(name)
        os.fsync(self._directory)

    def _verify(self) -> None:
        os.fsync(self._file)
        size = os.fstat(self._file).st_size
        if size != self._size or _sha256(self._file) != self._hash.hexdigest():
            raise Passing(
                "not_as_written",
                f"{self._size} bytes were written, {size} others read back",
                "check the disk",
            )

    def close(self) -> None:
        """Leave nothing behind but a completed file."""
        if self._file >= 0:
            if self._name:
                with suppress(OSError):  # what made us give up is what has to be told
                    os.unlink(self._name, dir_fd=self._directory)
            os.close(self._file)
        if self._directory >= 0:
            os.close(self._directory)
        self._file = self._directory = -1


def _name_taken(name: str) -> Passing:
    return Passing("name_taken", f"{name} is there now", "nothing: it is compared")


def _make_directories(base: str, folder: str) -> int:
    """Open a folder below `base`, making what is missing; return its descriptor."""
    Path(base).mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    current = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for step in folder.split("/") if folder else ():
        try:
            below = _open_or_make(step, current)
        finally:
            os.close(current)
        current = below
    return current


def _open_or_make(name: str, directory: int) -> int:
    try:
        os.mkdir(name, DIRECTORY_MODE, dir_fd=directory)
        os.fsync(directory)
    except FileExistsError:
        pass
    return os.open(name, _OPEN_DIRECTORY, dir_fd=directory)


def _remove_abandoned(directory: int) -> None:
    """Remove what killed shippers left: every live one keeps its file locked."""
    for name in os.listdir(directory):
        if name.startswith(TEMPORARY):
            with suppress(OSError):  # another's, or gone: either way nothing to do
                file = os.open(name, _OPEN_FOUND, dir_fd=directory)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=directory)
                finally:
                    os.close(file)


def _sha256_at(base: str, folder: str, name: str) -> str | None:
    """Return the hash of a file below `base`; empty for what is no regular file."""
    try:
        directory = _make_directories(base, folder)
        try:
            file = os.open(name, _OPEN_FOUND, dir_fd=directory)
        finally:
            os.close(directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return ""
        raise
    try:
        return _sha256(file) if stat.S_ISREG(os.fstat(file).st_mode) else ""
    finally:
        os.close(file)


def _sha256(file: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while data := os.pread(file, READ_SIZE, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


@contextmanager
def _as_failure(place: str) -> Iterator[None]:
    """Turn an error of the operating system into a failure that names the mend."""
    try:
        yield
    except OSError as error:
        raise failure_of(error, place) from error


def failure_of(error: OSError, place: str) -> Failure:
    """Classify an error met at a path."""
    text = f"{place}: {error.strerror or error}"
    number = error.errno or 0
    if number in FINAL:
        return Final(FINAL[number][0], text, FINAL[number][1])
    reason, mend = PASSING.get(number, ("file_system_failed", "check the file system"))
    return Passing(reason, text, mend)
