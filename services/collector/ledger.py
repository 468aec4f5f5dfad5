"""The ledger: what became of each crash, one file each, so that a restart goes on.

An entry is written before anything is published, and with every step after that. It is
replaced by rename, so it is always the old or the new one; rename(2).
"""

import asyncio
import time
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crashbus import layout
from crashbus.fields import CrashId, FileName, Fingerprint, Host, Time
from crashbus.layout import Kind
from crashbus.messages import Manifest
from crashbus.parts import CrashFile, Module, Process

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# Directory, name and owner of a file. Anybody may have had the name before: in a directory that is
# open to all, a name alone says nothing of whose file it is.
Place = tuple[str, str, int | None]


class Told(BaseModel):
    """What a dead letter said; see `DeadLetter`."""

    error: str = "it was given up, and the dead letter that said why is gone"
    mend: str = "see the logs of collector and shippers, then crashbus retry it; it is kept here"


class Source(BaseModel):
    """One crash file: where it lies, and how far its delivery is.

    Attributes:
        directory: its directory's name below the spool.
        owner: the UID that it belonged to; None in what an earlier version entered.
        note: why it is incomplete, if it is.
        expected: bytes that it would have whole, where it is known to be incomplete.
        in_order: it may have been sent while it was being written, `services.common.unfinished`.
        file: size, hash and form; None until it was read for the first time.
        delivered: the destinations that confirmed it.
        failed: the destinations that gave it up, each with its reason.
        told: what the dead letters said of it, by destination.
        lost: there is nothing left of it that could be delivered.
        removed: its copy here was removed for room, when all of it was on the bus.
        released: its chunks are off the bus, for no destination waits for them.
        on_bus: how many chunks the bus held when all had been published, copies included.
        offered_at: when its last work item was published; older failures count no more.
        renewals: how often its chunks were published again because a shipper missed some.
        renewed_for: the time of the dead letter that was the last reason for it.
    """

    directory: str = Field(pattern=r"^([0-9]{1,10}|build-id)$")
    name: FileName
    kind: Kind
    owner: int | None = None
    note: str | None = None
    expected: int | None = None
    in_order: bool = False
    file: CrashFile | None = None
    delivered: list[str] = Field(default_factory=list)
    failed: dict[str, str] = Field(default_factory=dict)
    told: dict[str, Told] = Field(default_factory=dict)
    lost: bool = False
    removed: bool = False
    released: bool = False
    on_bus: int = 0
    offered_at: float = 0.0
    renewals: int = 0
    renewed_for: float = 0.0

    @property
    def place(self) -> Place:
        """Where it lies, and whose it is there."""
        return self.directory, self.name, self.owner

    def waits_for(self, destinations: tuple[str, ...]) -> tuple[str, ...]:
        """Return the destinations that have neither confirmed it nor given it up."""
        return tuple(d for d in destinations if d not in self.delivered and d not in self.failed)

    def give_up(self, destination: str, reason: str, told: Told) -> None:
        """Note that a destination does not wait for it any more."""
        self.failed[destination], self.told[destination] = reason, told

    def expect(self, destination: str) -> None:
        """Note that nothing is wrong with a destination any more."""
        self.failed.pop(destination, None)
        self.told.pop(destination, None)


class Crash(BaseModel):
    """A crash and its delivery. Mutable: `Ledger.save` makes a change last."""

    model_config = ConfigDict(validate_assignment=True)

    crash_id: CrashId
    host: Host
    crashed_at: Time
    process: Process
    signal: int = 0
    signal_name: str = "unknown"
    signal_at: float = 0.0  # Unix time; what an earlier version entered was not overtaken
    signal_recorded: bool = False  # a capture record tells of it, or of what it ended in
    code: int | None = None
    code_meaning: str | None = None
    fault_address: int | None = None
    fingerprint: Fingerprint | None = None
    build_fingerprint: Fingerprint | None = None
    destinations: tuple[str, ...] = ()
    notes: list[str] = Field(default_factory=list)
    sources: dict[str, Source] = Field(default_factory=dict)
    modules: tuple[Module, ...] = ()
    offered: set[str] = Field(default_factory=set)  # subjects of work items ever published
    revision: int = 0
    reported_at: float = 0.0
    reported: tuple[str, ...] | None = None  # names in the latest manifest
    manifest: Source | None = None  # manifest.json of the latest revision
    delivered_at: float | None = None

    def in_order(self) -> list[Source]:
        """Return the files in the order in which they are shipped."""
        return sorted(
            self.sources.values(), key=lambda s: (layout.SHIPPING_ORDER.index(s.kind), s.name)
        )

    def to_manifest(self) -> Manifest:
        """Return the manifest of all files; each must have been read."""
        return Manifest(
            host=self.host,
            time=self.reported_at,
            crash_id=self.crash_id,
            crashed_at=self.crashed_at,
            process_name=self.process.comm,
            revision=self.revision,
            process=self.process,
            signal=self.signal,
            signal_name=self.signal_name,
            code=self.code,
            code_meaning=self.code_meaning,
            fault_address=self.fault_address,
            fingerprint=self.fingerprint,
            build_fingerprint=self.build_fingerprint,
            files=tuple(s.file for s in self.in_order() if s.file is not None),
            modules=self.modules,
            destinations=self.destinations,
            notes=tuple(self.notes),
        )


class Ledger:
    """All entries, in memory and on disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._crashes: dict[str, Crash] = {}
        self._files: set[Place] = set()
        self._writing: dict[str, asyncio.Lock] = {}

    def load(self) -> None:
        """Read all entries; one that cannot be read is put aside, and its files found anew."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._directory.glob("*.json"):
            try:
                crash = Crash.model_validate_json(path.read_bytes())
            except ValidationError as error:
                aside = path.with_suffix(".unreadable")
                path.rename(aside)
                log.error("ledger entry put aside", path=str(aside), error=str(error))
                continue
            self._keep(crash)

    def _keep(self, crash: Crash) -> None:
        self._crashes[crash.crash_id] = crash
        self._files.update(source.place for source in crash.sources.values())

    async def save(self, crash: Crash) -> None:
        """Make an entry last, as it is when its turn to be written comes.

        It is not synced: should the host lose its power, an entry may be gone, and then its
        files are found and delivered anew, under the same names.

        Raises:
            OSError: the disk is full or broken; the former entry is still there.
        """
        self._keep(crash)
        async with self._writing.setdefault(crash.crash_id, asyncio.Lock()):
            data = crash.model_dump_json(indent=1).encode()
            await asyncio.to_thread(self._replace, self._path(crash.crash_id), data)

    def _replace(self, path: Path, data: bytes) -> None:
        new = path.with_suffix(".new")
        new.write_bytes(data)
        new.rename(path)

    async def forget(self, crash: Crash) -> None:
        """Remove an entry whose files are removed; one that is made anew meanwhile stays."""
        crash_id = crash.crash_id
        self._crashes.pop(crash_id, None)
        self._files.difference_update(source.place for source in crash.sources.values())
        async with self._writing.setdefault(crash_id, asyncio.Lock()):
            await asyncio.to_thread(self._path(crash_id).unlink, missing_ok=True)
        if crash_id not in self._crashes:
            self._writing.pop(crash_id, None)

    def get(self, crash_id: str) -> Crash | None:
        """Return an entry."""
        return self._crashes.get(crash_id)

    def crashes(self) -> list[Crash]:
        """Return all entries, oldest crash first."""
        return sorted(self._crashes.values(), key=lambda crash: crash.crashed_at)

    def open_crashes(self) -> list[Crash]:
        """Return those that are not delivered yet."""
        return [crash for crash in self.crashes() if crash.delivered_at is None]

    def knows_file(self, directory: str, name: str, owner: int) -> bool:
        """Tell whether a file in the spool belongs to an entry; safe in any thread."""
        places: set[Place] = {(directory, name, owner), (directory, name, None)}
        return not places.isdisjoint(self._files)

    def expired(self, keep: float) -> list[Crash]:
        """Return the delivered crashes that have been kept for `keep` seconds."""
        limit = time.time() - keep
        return [c for c in self.crashes() if c.delivered_at is not None and c.delivered_at <= limit]

    def _path(self, crash_id: str) -> Path:
        return self._directory / f"{crash_id}.json"
