"""What a receiver of crash files over TCP makes of a connection: files, verified where they can be.

Whoever connects may send anything. Nothing is believed before it was checked, nothing is held
beyond a bound, and a file gets its name only when it is whole.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from crashbus import frames, layout, names
from crashbus.chunks import Chunk, Verifier
from crashbus.errors import CrashbusError, DamagedFile
from crashbus.fields import CrashId, Host
from crashbus.frames import BadFrame, CoreChunk, CoreEnd, Frame

MAX_LINE = 16 * 1024 * 1024  # bytes; a chunk of a core in base64 has 11 MiB at most
MAX_SMALL = 32 * 1024 * 1024  # bytes of a crash's small files; a shipper sends 16 MiB at most
_MODE = 0o640  # crash files hold secrets
_DIRECTORY_MODE = 0o750
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Refused(CrashbusError):
    """A connection is ended, for what it sent or for want of room."""


@dataclass(frozen=True)
class Limits:
    """How much is taken.

    Attributes:
        file: bytes of one file.
        free: bytes that stay free on the disk.
    """

    file: int = 256 * 1024**3
    free: int = 1024**3


class _Snapshot(BaseModel):
    """The part of a snapshot that tells where a crash's files belong."""

    Time: datetime
    Hostname: Host
    ProcessName: Annotated[str, Field(max_length=256)]
    CrashId: CrashId


_SMALL: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


@dataclass
class Receiving:
    """The files of one connection; its calls block.

    Args:
        base: the directory below which files are stored.
        peer: who sends, for the folder of files that do not say what they belong to.
        stored: called with each file that is stored.
    """

    base: Path
    peer: str
    limits: Limits
    stored: Callable[[Path], None]
    _small: dict[str, bytes] = field(default_factory=dict)
    _core: "_Core | None" = None

    @property
    def is_in_core(self) -> bool:
        """Whether a core has begun and not ended."""
        return self._core is not None

    def line(self, text: bytes) -> None:
        """Take a line.

        Raises:
            Refused: it is not one that a shipper sends.
        """
        try:
            content = _SMALL.validate_json(text)
        except ValidationError:
            raise Refused("a line is not JSON") from None
        if len(content) != 1:
            raise Refused("a line is of one file")
        ((name, value),) = content.items()
        parsed = layout.parse_crash_file_name(name)
        if parsed is None:
            raise Refused(f"{names.printable(name[:100])!r} is no crash file's name")
        if parsed[0] is layout.Kind.CORE:
            self.frame(_frame(text, None))
        else:
            self._take_small(name, value)

    def _take_small(self, name: str, value: object) -> None:
        if name in self._small or not _same_set(name, self._small):
            self.store_small()
        data = _content(value)
        if len(data) + sum(map(len, self._small.values())) > MAX_SMALL:
            raise _too_large()
        self._small[name] = data

    def frame(self, frame: Frame) -> None:
        """Take a frame of a core.

        Raises:
            Refused: it is not the one that is due, or there is no room.
        """
        self.store_small()
        try:
            if self._core is None:
                self._core = _Core(self.base, frame, self.limits)
            if isinstance(frame.told, CoreEnd):
                path = self._core.end(frame, frame.told)
                self._core = None
                self.stored(path)
            else:
                self._core.add(frame, frame.told)
        except (BadFrame, DamagedFile) as error:
            raise Refused(str(error)) from None

    def end(self) -> None:
        """The connection was ended in order.

        Raises:
            Refused: in the midst of a core.
        """
        self.store_small()
        if self._core is not None:
            raise Refused("the connection ended in the midst of a core")

    def give_up(self) -> None:
        """Remove what is not whole."""
        if self._core is not None:
            self._core.remove()
            self._core = None

    def store_small(self) -> None:
        """Store the small files that came: no more will come of their crash.

        Raises:
            Refused: there is no room.
        """
        if not self._small:
            return
        files, self._small = self._small, {}
        folder = _folder_of(files) or self._unnamed()
        for name, data in files.items():
            _check_room(self.base, len(data), self.limits)
            temporary = _make(self.base / folder)
            try:
                with os.fdopen(temporary.descriptor, "wb") as file:
                    file.write(data)
                    os.fsync(file.fileno())
                self.stored(temporary.become(name))
            except BaseException:
                temporary.remove()
                raise

    def _unnamed(self) -> str:
        now = datetime.now(UTC)
        peer = names.file_name(self.peer.encode())
        return f"unnamed/{now:%Y-%m-%d}/{now:%H%M%S}-{peer}-{secrets.token_hex(4)}"


def _frame(text: bytes, body: bytes | None) -> Frame:
    try:
        return frames.read(text, body)
    except BadFrame as error:
        raise Refused(str(error)) from None


def _same_set(name: str, others: dict[str, bytes]) -> bool:
    def epoch(one: str) -> int:
        parsed = layout.parse_crash_file_name(one)
        return parsed[1] if parsed else -1

    return all(epoch(name) == epoch(one) for one in others)


def _content(value: object) -> bytes:
    """Return a small file's content: its lines, or the JSON that it was.

    Raises:
        Refused: with the indentation of what is nested it would have many times its size.
    """
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n".join(value).encode("utf-8", "surrogatepass")
    text = bytearray()
    for part in json.JSONEncoder(indent=1).iterencode(value):
        text += part.encode()
        if len(text) > MAX_SMALL:
            raise _too_large()
    return bytes(text)


def _too_large() -> Refused:
    return Refused(f"the small files of a crash have more than {MAX_SMALL} bytes")


def _folder_of(files: dict[str, bytes]) -> str | None:
    """Return the folder of a crash whose snapshot is among the files."""
    for name, data in files.items():
        if name.startswith(f"{layout.Kind.SNAPSHOT}_"):
            try:
                said = _Snapshot.model_validate_json(data)
                at = said.Time.timestamp()
                return layout.folder(said.Hostname, at, said.ProcessName, said.CrashId)
            except (ValidationError, ValueError, OverflowError, OSError):
                return None
    return None


def _check_room(base: Path, size: int, limits: Limits) -> None:
    disk = os.statvfs(base)
    if disk.f_bavail * disk.f_frsize < size + limits.free:
        raise Refused(f"the disk is to keep {limits.free} bytes free; make room in {base}")


@dataclass
class _Temporary:
    """A file without its name."""

    descriptor: int
    directory: Path
    name: str

    def become(self, name: str) -> Path:
        """Give it its name, on the disk too."""
        path = self.directory / name
        (self.directory / self.name).replace(path)
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return path

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            (self.directory / self.name).unlink()


def _make(directory: Path) -> _Temporary:
    directory.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
    name = f".receiving-{secrets.token_hex(8)}"
    return _Temporary(os.open(directory / name, _NEW, _MODE), directory, name)


class _Core:
    """A core that is coming, chunk by chunk, in order."""

    def __init__(self, base: Path, first: Frame, limits: Limits) -> None:
        self._base = base
        self._limits = limits
        self._name = first.name
        self._crash_id = first.told.crash_id
        self._encoding = first.told.encoding
        self._verifier = Verifier(first.told.encoding)
        self._temporary = _make(base / first.folder)
        self._file = os.fdopen(self._temporary.descriptor, "wb")

    def add(self, frame: Frame, told: CoreChunk) -> None:
        """Add the chunk that is due."""
        self._is_ours(frame)
        if hashlib.sha256(frame.body).hexdigest() != told.sha256:
            raise BadFrame(f"chunk {told.chunk} is not what its hash says")
        if told.offset != self._verifier.size:
            raise BadFrame(f"chunk {told.chunk} is of {told.offset}, not {self._verifier.size}")
        if not 0 < told.size <= frames.MAX_BODY:
            raise BadFrame(f"chunk {told.chunk} claims {told.size} bytes")
        if self._verifier.stored_size + len(frame.body) > self._limits.file:
            raise Refused(f"a file may have {self._limits.file} bytes; see --max-file")
        _check_room(self._base, len(frame.body), self._limits)
        self._verifier.accept(Chunk(told.chunk, told.size, frame.body, told.sha256))
        self._file.write(frame.body)

    def end(self, frame: Frame, told: CoreEnd) -> Path:
        """Check the whole core and give it its name."""
        self._is_ours(frame)
        if told.chunks != self._verifier.next_index:
            raise BadFrame(f"{self._verifier.next_index} chunks came, {told.chunks} were sent")
        self._verifier.finish(told.size, told.sha256)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        zstd = self._encoding == "zstd"
        return self._temporary.become(f"{self._name}.zst" if zstd else self._name)

    def _is_ours(self, frame: Frame) -> None:
        told = frame.told
        ours = (self._name, self._crash_id, self._encoding)
        if (frame.name, told.crash_id, told.encoding) != ours:
            raise BadFrame(f"a frame of {frame.name} came in the midst of {self._name}")

    def remove(self) -> None:
        """Leave nothing of it."""
        self._file.close()
        self._temporary.remove()
