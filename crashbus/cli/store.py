"""Reading crashes back from a destination.

A destination holds ``<host>/<day>/<time>-<process>-<crash ID>/manifest.json`` with the crash's
files beside it (see `crashbus.layout`), so what is there can be found without a bus.
"""

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, Self

from pydantic import ValidationError

from crashbus import Manifest, destination, layout, names
from crashbus.cli.errors import Trouble
from crashbus.destination import DestinationError

_FOLDER = re.compile(
    r"(?P<host>[^/]+)/(?P<day>\d{4}-\d\d-\d\d)/(?P<time>\d{6})-(?P<process>[^/]+)"
    r"-(?P<id>[0-9a-hjkmnp-tv-z]{16})"
)

_READABLE = "name s3://bucket/prefix or file:///path"

MAX_MANIFEST = 8 * 1024 * 1024  # bytes; a manifest lists few files, but arguments may be long


class StoreError(Trouble):
    """A destination cannot be read."""


class NotThere(StoreError):
    """The destination has no such object."""


class UnreadableManifest(StoreError):
    """A manifest that is none."""


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes; none at the end."""


@dataclass(frozen=True)
class Place:
    """Where one crash lies in a store, and what the folder's name tells of it.

    Attributes:
        folder: as `crashbus.layout.folder` made it.
    """

    folder: str
    host: str
    crashed_at: float
    process_name: str
    crash_id: str

    @classmethod
    def of(cls, folder: str) -> Self | None:
        """Read a folder's name; None for a folder that is no crash's."""
        match = _FOLDER.fullmatch(folder)
        if match is None:
            return None
        try:
            at = datetime.strptime(match["day"] + match["time"], "%Y-%m-%d%H%M%S")
        except ValueError:
            return None
        return cls(
            folder,
            names.untoken(match["host"]),
            at.replace(tzinfo=UTC).timestamp(),
            names.untoken(match["process"]),
            match["id"],
        )


class Store(ABC):
    """A destination that can be read back.

    Attributes:
        url: the destination's URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def open(self, key: str) -> AbstractContextManager[Readable]:
        """Open an object by its key below the destination's prefix.

        Raises:
            NotThere: there is no such object.
            StoreError: the destination cannot be read, now or while reading.
        """

    @abstractmethod
    def _folders(self, below: str) -> list[str]:
        """Return the names of the folders in one folder (``""`` for the top)."""

    def probe(self) -> None:
        """See whether the destination can be read.

        Raises:
            StoreError: it cannot.
        """
        self._folders("")

    def places(self, host: str | None = None) -> Iterator[Place]:
        """Yield the crashes there, newest first; later days are listed before earlier ones
        are asked for, so the newest few cost few requests.
        """
        hosts = [names.file_name(host.encode())] if host else self._folders("")
        days = [
            (day, one)
            for one in hosts
            for day in self._folders(f"{one}/")
            if one != layout.BINARIES or len(day) > len("xx")
        ]
        for day in sorted({day for day, _ in days}, reverse=True):
            yield from self._of_day(day, [one for its_day, one in days if its_day == day])

    def _of_day(self, day: str, hosts: list[str]) -> list[Place]:
        folders = (
            f"{host}/{day}/{folder}" for host in hosts for folder in self._folders(f"{host}/{day}/")
        )
        found = (Place.of(folder) for folder in folders)
        return sorted((p for p in found if p), key=lambda p: p.crashed_at, reverse=True)

    def manifest(self, place: Place) -> Manifest:
        """Read a crash's manifest.

        Raises:
            NotThere: the crash is not wholly delivered yet.
            UnreadableManifest: what lies there is none.
            StoreError: it cannot be read.
        """
        key = f"{place.folder}/{layout.MANIFEST_NAME}"
        with self.open(key) as stream:
            data = read_at_most(stream, MAX_MANIFEST)
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise UnreadableManifest(
                f"{self.url}: {key} is no manifest ({error.error_count()} faults)",
                "somebody changed what was delivered; take another destination",
            ) from None


def read_at_most(stream: Readable, limit: int) -> bytes:
    """Read a stream to its end, or to `limit` bytes."""
    blocks, total = [], 0
    while total < limit and (block := stream.read(limit - total)):
        blocks.append(block)
        total += len(block)
    return b"".join(blocks)


def open_store(url: str) -> Store:
    """Return the store at a destination's URL; nothing is asked of it yet.

    Raises:
        DestinationError: no such URL.
        StoreError: a destination of this kind cannot be read back.
        SettingsError: the settings for it are wrong.
    """
    parsed = destination.parse(url)
    match parsed.scheme:
        case "file":
            return FileStore(parsed.url, Path(parsed.path))
        case "s3":
            from crashbus.cli.s3 import S3Store  # takes a tenth of a second to import

            return S3Store(parsed)
    raise StoreError(f"{parsed.url}: what went over a connection cannot be read back", _READABLE)


def can_read(url: str) -> bool:
    """Tell whether a destination of this kind can be read back."""
    try:
        return destination.parse(url).scheme in ("file", "s3")
    except DestinationError:
        return False


class FileStore(Store):
    """``file:///path``: a directory."""

    def __init__(self, url: str, directory: Path) -> None:
        super().__init__(url)
        self._directory = directory

    @contextmanager
    def open(self, key: str) -> Iterator[Readable]:
        # Whoever may write there may leave a link or a pipe in a file's place: neither is
        # followed nor waited for.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self._directory / key, flags)
            with os.fdopen(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise StoreError(f"{self.url}: {key} is no regular file", "remove it")
                yield file
        except (FileNotFoundError, NotADirectoryError):
            raise NotThere(f"{self.url} has no {key}", "take another destination") from None
        except OSError as error:
            raise StoreError(
                f"{self.url}: cannot read {key}: {error.strerror}", "run as a user who may"
            ) from error

    def _folders(self, below: str) -> list[str]:
        directory = self._directory / below
        try:
            with os.scandir(directory) as entries:
                return [one.name for one in entries if one.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            if below:
                return []
            raise StoreError(f"{self.url}: no such directory", "check the path") from None
        except OSError as error:
            raise StoreError(
                f"{self.url}: cannot list {directory}: {error.strerror}", "run as a user who may"
            ) from error
