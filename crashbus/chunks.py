"""Chunk = frame = range: how a crash file travels.

A file is cut into ranges of its own bytes. Each range becomes one chunk: with the encoding
``zstd`` one zstd frame by itself (RFC 8878), with ``identity`` the bytes as they are. Chunks laid
end to end are what a destination stores: a valid ``.zst`` file, or the file itself. Any chunk can
be made again from the source alone: where ranges begin and end follows from the content.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import zstandard

from crashbus.errors import DamagedFile
from crashbus.fields import Encoding

HEADER_INDEX = "Crashbus-Index"
HEADER_SIZE = "Crashbus-Size"
HEADER_SHA256 = "Crashbus-SHA256"

Unpacked = bytes | memoryview

_KIB = 1024
_HEADER_ROOM = 4 * _KIB  # NATS counts headers into max_payload
_GRAIN = 64 * _KIB
_RUN_OF_ONE_BYTE = 1  # a type of block, RFC 8878, 3.1.1.2
ZERO_RUN = 4  # ranges of zeros that travel together
MAX_CHUNK_SIZE = 8 * _KIB * _KIB  # NATS advises against larger messages, whatever it allows


@dataclass(frozen=True)
class Chunk:
    """One chunk.

    Attributes:
        index: position in the file, from 0.
        size: bytes of the file in this chunk, before compression.
        body: what travels and is stored.
        sha256: hexadecimal SHA-256 of `body`.
    """

    index: int
    size: int
    body: bytes
    sha256: str

    def headers(self) -> dict[str, str]:
        """Return the NATS headers that travel with the body."""
        return {
            HEADER_INDEX: str(self.index),
            HEADER_SIZE: str(self.size),
            HEADER_SHA256: self.sha256,
        }

    @classmethod
    def received(cls, headers: Mapping[str, str] | None, body: bytes) -> "Chunk":
        """Read a chunk from a NATS message and check its hash.

        Raises:
            DamagedFile: a header is missing or wrong, or the body is not what was sent.
        """
        given = headers or {}
        try:
            index, size = int(given[HEADER_INDEX]), int(given[HEADER_SIZE])
            expected = given[HEADER_SHA256]
        except (KeyError, ValueError) as error:
            raise DamagedFile(f"chunk with a missing or bad header: {error}") from None
        actual = hashlib.sha256(body).hexdigest()
        if actual != expected:
            raise DamagedFile(f"chunk {index} has SHA-256 {actual}, its header says {expected}")
        if index < 0 or not 0 < size <= MAX_CHUNK_SIZE:
            raise DamagedFile(f"chunk {index} claims {size} bytes")
        return cls(index, size, body, actual)


def chunk_size(max_payload: int) -> int:
    """Return how many bytes of a file fit one message, even when they do not compress.

    Args:
        max_payload: the server's limit for one message with its headers, in bytes.

    Raises:
        ValueError: the limit leaves no room; raise the server's ``max_payload``.
    """
    room = max_payload - _HEADER_ROOM
    # ZSTD_compressBound (zstd.h): incompressible input grows by 1/256 and some bytes.
    size = min((room - room // 128) // _GRAIN * _GRAIN, MAX_CHUNK_SIZE)
    if size <= 0:
        raise ValueError(f"max_payload {max_payload} is too small, set 256KB or more")
    return size


@dataclass(frozen=True)
class Packed:
    """A chunk that has no number yet; what it has is as in `Chunk`."""

    size: int
    body: bytes
    sha256: str


@dataclass(frozen=True)
class ZeroRun:
    """Ranges of nothing but zeros, of which one message can tell more than of others.

    Attributes:
        one: the chunk of one.
        most: how many ranges make a run.
        whole: the chunk of a run.
    """

    one: Packed
    most: int
    whole: Packed


@dataclass(frozen=True)
class _Zeros:
    """A whole range of nothing but zeros.

    Attributes:
        packed: its chunks; none where nothing is compressed.
    """

    data: bytes
    packed: list[Packed]
    run: ZeroRun | None


# By what they depend on, once for all files: to make them takes milliseconds.
_made: dict[tuple[int, Encoding, int], _Zeros] = {}
_making = threading.Lock()


class Packer:
    """Makes chunks of ranges, in any order and in any number of threads.

    What is to be compressed comes in ranges of twice the bytes that fit a message, for it costs
    bus and services nearly as much to pass on a small message as a large one. Where the frame
    does not fit, each half has one.

    Args:
        size: bytes that fit one message, even if they do not compress.
        level: zstd's; of no matter where nothing is compressed.

    Attributes:
        range_size: bytes of a whole range.
    """

    def __init__(self, size: int, encoding: Encoding, level: int = 1) -> None:
        self._size = size
        self._encoding = encoding
        self._level = level
        is_doubled = encoding == "zstd" and 2 * size <= MAX_CHUNK_SIZE
        self.range_size = 2 * size if is_doubled else size
        self._own = threading.local()  # a compressor serves one thread at a time

    @property
    def zeros(self) -> bytes:
        """A whole range of zeros, for those who know that there is nothing else."""
        return self._zeros.data

    @property
    def zero_run(self) -> ZeroRun | None:
        """What several ranges of nothing but zeros become; None: no more than one."""
        return self._zeros.run

    @cached_property
    def _zeros(self) -> _Zeros:
        """Zeros are packed only once, for a core may have terabytes of them; by who packs first,
        which is no event loop."""
        key = self._size, self._encoding, self._level
        with _making:
            if key not in _made:
                _made[key] = self._make_zeros()
            return _made[key]

    def _make_zeros(self) -> _Zeros:
        data = bytes(self.range_size)
        if self._encoding == "identity":
            return _Zeros(data, [], None)
        packed = self._pack(data)
        return _Zeros(data, packed, self._zero_run(packed))

    def pack(self, data: bytes | bytearray) -> list[Packed]:
        """Return the chunks of a range, one or two; the caller may overwrite `data` afterwards.

        Args:
            data: `range_size` bytes, or fewer at the end of a file.
        """
        if self._encoding == "zstd" and data == self._zeros.data:
            return self._zeros.packed
        return self._pack(data)

    def _pack(self, data: bytes | bytearray) -> list[Packed]:
        if self._encoding == "identity":
            return [_packed(data, bytes(data))]
        body = self._compressor.compress(data)
        if len(data) <= self._size or len(body) <= self._size:
            return [_packed(data, body)]
        halves = memoryview(data)[: self._size], memoryview(data)[self._size :]
        return [_packed(half, self._compressor.compress(half)) for half in halves]

    def _zero_run(self, packed: list[Packed]) -> ZeroRun | None:
        most = min(ZERO_RUN, MAX_CHUNK_SIZE // self.range_size)
        if len(packed) > 1 or most < 2:
            return None
        zeros = bytes(most * self.range_size)
        whole = _packed(zeros, self._compressor.compress(zeros))
        return ZeroRun(packed[0], most, whole) if len(whole.body) <= self._size else None

    @property
    def _compressor(self) -> zstandard.ZstdCompressor:
        try:
            found: zstandard.ZstdCompressor = self._own.compressor
        except AttributeError:
            found = self._own.compressor = zstandard.ZstdCompressor(level=self._level)
        return found


def _packed(data: bytes | bytearray | memoryview, body: bytes) -> Packed:
    return Packed(len(data), body, hashlib.sha256(body).hexdigest())


class Encoder:
    """Cuts a file into chunks; knows its size and hash when all chunks are made.

    Args:
        size: bytes that fit one message, even if they do not compress.
        level: see `Packer`.

    Attributes:
        size: bytes of the file so far.
        stored_size: bytes of its chunks so far.
        count: how many those are.
    """

    def __init__(self, size: int, encoding: Encoding, level: int = 1) -> None:
        self.encoding = encoding
        self.packer = Packer(size, encoding, level)
        self._hash = hashlib.sha256()
        self._zero_ranges = 0  # that may become a run
        self.size = 0
        self.stored_size = 0
        self.count = 0

    @property
    def range_size(self) -> int:
        """Bytes of a whole range."""
        return self.packer.range_size

    def chunks(self, source: BinaryIO) -> Iterator[Chunk]:
        """Yield the chunks of `source` from its current position to its end."""
        while data := source.read(self.range_size):
            self.cut(data)
            yield from self.number(self.packer.pack(data))
        yield from self.finish()

    def cut(self, data: bytes | bytearray) -> None:
        """Take the next range of the file, `range_size` bytes but for the last; `packer` makes its
        chunks.
        """
        self._hash.update(data)
        self.size += len(data)

    def number(self, packed: Iterable[Packed]) -> Iterator[Chunk]:
        """Yield the next chunks of the file; those of zeros wait until they are a run, or end."""
        run = self.packer.zero_run
        for one in packed:
            if run is None or one is not run.one:
                yield from self.finish()
                yield self._next(one)
                continue
            self._zero_ranges += 1
            if self._zero_ranges == run.most:
                self._zero_ranges = 0
                yield self._next(run.whole)

    def finish(self) -> Iterator[Chunk]:
        """Yield what still waits, at the end of the file."""
        while self._zero_ranges and (run := self.packer.zero_run) is not None:
            self._zero_ranges -= 1
            yield self._next(run.one)

    def _next(self, one: Packed) -> Chunk:
        chunk = Chunk(self.count, one.size, one.body, one.sha256)
        self.count += 1
        self.stored_size += len(one.body)
        return chunk

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of all file bytes so far."""
        return self._hash.hexdigest()


class Verifier:
    """Checks that chunks, in order, are the file that was announced.

    Every frame is decompressed within its announced size, so that a hostile frame cannot
    blow up memory.

    Attributes:
        next_index: of the chunk that is due.
        size: bytes of the file so far.
        stored_size: bytes of its chunks so far.
    """

    def __init__(self, encoding: Encoding) -> None:
        self.is_compressed = encoding == "zstd"
        self._hash = hashlib.sha256()
        self.next_index = 0
        self.size = 0
        self.stored_size = 0

    def accept(self, chunk: Chunk) -> bytes:
        """Take the next chunk and return its file bytes.

        Raises:
            DamagedFile: not the next chunk, or it does not hold what it announces.
        """
        data = self.unpack(chunk)
        self.take(chunk, data)
        return bytes(data)

    def unpack(self, chunk: Chunk, buffer: bytearray | None = None) -> Unpacked:
        """Return the file bytes of a chunk, whichever is due; at any time, in any thread.

        Args:
            buffer: where to put them if they were compressed, of `chunk.size` bytes or more. A
                fresh block for each chunk costs the kernel as much as decompressing does.

        Raises:
            DamagedFile: it does not hold what it announces.
        """
        if not self.is_compressed:
            if len(chunk.body) != chunk.size:
                raise DamagedFile(
                    f"chunk {chunk.index}: {len(chunk.body)} bytes, {chunk.size} announced"
                )
            return chunk.body
        try:
            announced = zstandard.frame_content_size(chunk.body)
            if announced != chunk.size:
                raise DamagedFile(f"chunk {chunk.index}: frame of {announced}, not {chunk.size}")
            # Bytes behind the frame would be stored unchecked.
            if _frame_length(chunk.body) != len(chunk.body):
                raise DamagedFile(f"chunk {chunk.index} is not one zstd frame")
            data = memoryview(buffer or bytearray(chunk.size))[: chunk.size]
            with zstandard.ZstdDecompressor().stream_reader(chunk.body) as frame:
                held = frame.readinto(data)
        except zstandard.ZstdError as error:
            raise DamagedFile(f"chunk {chunk.index} is not a zstd frame: {error}") from None
        if held != chunk.size:
            raise DamagedFile(f"chunk {chunk.index}: {held} bytes, {chunk.size} announced")
        return data

    def take(self, chunk: Chunk, data: Unpacked) -> None:
        """Take the next chunk, which was unpacked before.

        Raises:
            DamagedFile: it is not the next one.
        """
        if chunk.index != self.next_index:
            raise DamagedFile(f"chunk {chunk.index} came where {self.next_index} was due")
        self._hash.update(data)
        self.next_index += 1
        self.size += len(data)
        self.stored_size += len(chunk.body)

    def finish(self, size: int, sha256: str) -> None:
        """Check the whole file against what was announced.

        Raises:
            DamagedFile: size or SHA-256 differ.
        """
        if self.size != size:
            raise DamagedFile(f"{self.size} bytes came, {size} were announced")
        actual = self._hash.hexdigest()
        if actual != sha256:
            raise DamagedFile(f"SHA-256 is {actual}, {sha256} was announced")


def _frame_length(body: bytes) -> int:
    """Return the length of the frame that `body` begins with; 0 where it does not end in there.

    Its header, its blocks, each with a header of its own, and perhaps a checksum: RFC 8878, 3.1.1.
    """
    at = zstandard.frame_header_size(body)
    last = False
    while not last:
        header = int.from_bytes(body[at : at + 3], "little")
        if at + 3 > len(body):
            return 0
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == _RUN_OF_ONE_BYTE else size)
    if zstandard.get_frame_parameters(body).has_checksum:
        at += 4
    return at if at <= len(body) else 0
