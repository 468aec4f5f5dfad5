"""What is watched, on disk: after a restart it is watched on."""

import asyncio
from pathlib import Path

import structlog
from pydantic import Field, ValidationError

from crashbus.messages import SignalEvent

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Note(SignalEvent):
    """An event whose process is watched.

    Attributes:
        brought_out: the epochs of what is in the spool; False: cut, and worth another try.
    """

    brought_out: dict[int, bool] = Field(default_factory=dict)


class Notes:
    """Notes in a directory, a file for each process; it has one writer at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def all(self) -> list[Note]:
        """Return those of an earlier run."""
        return await asyncio.to_thread(self._read)

    async def keep(self, note: Note) -> None:
        """Make a note last.

        Raises:
            OSError: the disk is full or broken.
        """
        await asyncio.to_thread(self._write, note)

    async def remove(self, note: Note) -> None:
        """Remove a note: its process has ended."""
        await asyncio.to_thread(self._path(note).unlink, missing_ok=True)

    def _path(self, note: Note) -> Path:
        return self._directory / f"{note.crash_id}.json"

    def _write(self, note: Note) -> None:
        new = self._path(note).with_suffix(".new")
        new.write_text(note.model_dump_json())
        new.rename(self._path(note))

    def _read(self) -> list[Note]:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        notes = []
        for path in self._directory.glob("*.json"):
            try:
                notes.append(Note.model_validate_json(path.read_bytes()))
            except ValidationError as error:
                log.error("a note of a watch cannot be read", path=str(path), error=str(error))
                path.unlink()
        return notes
