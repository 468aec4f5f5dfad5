"""Fetching crash files: checked against the manifest, decompressed on the way.

A file is never held whole: blocks go from the destination through decompression and hash to
a hidden file that takes its name when all of it is verified.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import zstandard

from crashbus.chunks import MAX_CHUNK_SIZE
from crashbus.cli.errors import Trouble
from crashbus.cli.lookup import Copy, Found
from crashbus.cli.store import Readable, StoreError
from crashbus.errors import DamagedFile
from crashbus.parts import CrashFile

BLOCK = 256 * 1024
_ZEROS = bytes(BLOCK)
# A chunk is one frame, so no frame needs a larger window than the largest chunk; a hostile
# one may ask for 2 GiB (RFC 8878, 3.1.1.1.2).
_MAX_WINDOW = MAX_CHUNK_SIZE
# What does not compress grows by less than a hundredth (ZSTD_compressBound, zstd.h). Frames that
# hold nothing, or are there to be skipped (RFC 8878, 3.1.2), could go on for ever.
_MOST_GROWTH = 2
_MORE = 64 * 1024  # bytes, for what is small

OnBytes = Callable[[int], None]
T = TypeVar("T")


def refuse_to_overwrite(directory: Path, files: list[CrashFile]) -> None:
    """Raise `Trouble` if a directory has one of the files, or anything of its name."""
    for file in files:
        target = directory / file.name
        if os.path.lexists(target):
            raise Trouble(f"{target} exists", "take another directory with -o, or --force")


def is_whole(path: Path, file: CrashFile) -> bool:
    """Tell whether a crash file was fetched before: size and SHA-256 are right."""
    try:
        with path.open("rb") as there:
            return (
                os.fstat(there.fileno()).st_size == file.size
                and hashlib.file_digest(there, "sha256").hexdigest() == file.sha256
            )
    except OSError:
        return False


def save(found: Found, file: CrashFile, directory: Path, on: OnBytes) -> Path:
    """Fetch one file into a directory, from the first copy that proves to be right.

    Args:
        on: called with the number of file bytes fetched so far.

    Returns:
        The new file, mode 0600; its zero runs are holes.

    Raises:
        Trouble: no copy is right, or the file cannot be written.
    """
    target = directory / file.name

    def write(copy: Copy, key: str) -> Path:
        try:
            with closing(contents(copy, key, file)) as blocks:
                _write(target, blocks, on)
        except OSError as error:
            raise Trouble(
                f"cannot write {target}: {error.strerror}", "take another directory with -o"
            ) from error
        return target

    return from_any_copy(found, file, write)


def from_any_copy(found: Found, file: CrashFile, use: Callable[[Copy, str], T]) -> T:
    """Return what `use` makes of the first copy, and key in it, that can be read and is not
    damaged.
    """
    errors = []
    for copy, key in ((one, key) for one in found.copies for key in one.keys(file)):
        try:
            return use(copy, key)
        except (StoreError, DamagedFile) as error:
            errors.append(str(error))
    if not errors:
        urls = ", ".join(found.crash.manifest.destinations if found.crash.manifest else ())
        raise Trouble(
            f"{file.name} is at no destination that can be read back ({urls})",
            "name one with --from s3://… or file:///…",
        )
    raise Trouble(f"cannot get {file.name}: {'; '.join(errors)}", "see crashbus doctor")


def contents(copy: Copy, key: str, file: CrashFile) -> Generator[bytes, None, None]:
    """Yield a crash file's own bytes in blocks of at most 256 KiB.

    Raises:
        StoreError: it cannot be read.
        DamagedFile: it is not what the manifest announces; said at the latest after the
            last block, never after more bytes than were announced, nor after reading much more
            than these can take compressed.
    """
    digest, size = hashlib.sha256(), 0
    where = f"{copy.source.url}: {key}"
    with copy.source.open(key) as stored:
        for block in _file_bytes(stored, file, where):
            size += len(block)
            if size > file.size:
                raise DamagedFile(f"{where} is larger than the {file.size} bytes announced")
            digest.update(block)
            yield block
    if size != file.size:
        raise DamagedFile(f"{where} has {size} bytes, the manifest says {file.size}")
    if digest.hexdigest() != file.sha256:
        raise DamagedFile(
            f"{where} has SHA-256 {digest.hexdigest()}, the manifest says {file.sha256}"
        )


def _file_bytes(stored: Readable, file: CrashFile, where: str) -> Iterator[bytes]:
    source = stored
    if file.encoding == "zstd":
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        bounded = _Bounded(stored, _MOST_GROWTH * file.size + _MORE, where)
        source = decompressor.stream_reader(cast(BinaryIO, bounded), read_across_frames=True)
    try:
        while block := source.read(BLOCK):
            yield block
    except zstandard.ZstdError as error:
        raise DamagedFile(f"{where} is not valid zstd: {error}") from None


class _Bounded:
    """A stream that may be read as far as `limit` bytes.

    Args:
        where: what the error calls it.
    """

    def __init__(self, stream: Readable, limit: int, where: str) -> None:
        self._stream = stream
        self._limit = limit
        self._left = limit
        self._where = where

    def read(self, size: int = -1, /) -> bytes:
        """As the stream's own.

        Raises:
            DamagedFile: it goes on beyond its limit.
        """
        block = self._stream.read(size)
        self._left -= len(block)
        if self._left < 0:
            raise DamagedFile(
                f"{self._where} goes on beyond {self._limit} bytes of compressed data"
            )
        return block


def _write(target: Path, blocks: Iterator[bytes], on: OnBytes) -> None:
    descriptor, hidden = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            done = 0
            for block in blocks:
                if block == _ZEROS[: len(block)]:
                    file.seek(len(block), os.SEEK_CUR)
                else:
                    file.write(block)
                done += len(block)
                on(done)
            file.truncate(done)
        Path(hidden).replace(target)
    except BaseException:  # Ctrl-C too: nothing unverified stays
        Path(hidden).unlink(missing_ok=True)
        raise
