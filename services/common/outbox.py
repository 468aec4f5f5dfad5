"""Messages that wait for the bus: on disk, oldest first, within bounds.

A message is put here before anyone tries to publish it and removed once the bus has stored
it, so a killed service publishes it again (the bus drops the copy by its ID). While the disk
refuses, messages wait in memory, within a bound of their own. What does not fit is counted.

SQLite in WAL mode with synchronous=NORMAL: a commit outlives the death of the process, a
power cut may cost the last of them (https://sqlite.org/pragma.html#pragma_synchronous).
"""

import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import structlog

from crashbus.message_base import Message

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MEMORY_BYTES = 8 * 1024**2  # while the disk refuses
EXPENDABLE_SHARE = 0.8  # of the bounds; the rest is kept for what must not be lost
RETRY_DISK = 1.0  # seconds between tries of a disk that refused
_BUSY = 1.0  # seconds to wait for another process's lock: that of one that is just ending

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_MEND = "free disk space, or name another directory in CRASHBUS_STATE"

_SCHEMA = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA journal_size_limit = 4194304;
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    subject TEXT NOT NULL,
    message_id TEXT NOT NULL,
    payload BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS lost (count INTEGER NOT NULL);
"""


@dataclass(frozen=True)
class Outgoing:
    """A message that is to be published.

    Attributes:
        message_id: key by which the bus drops a second copy.
        expendable: others go first when room is short.
    """

    subject: str
    payload: bytes
    message_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    expendable: bool = False

    @classmethod
    def of(cls, message: Message, expendable: bool = False) -> "Outgoing":
        """Encode a message."""
        key = message.message_id or uuid.uuid4().hex
        return cls(message.subject, message.encode(), key, expendable)


@dataclass(frozen=True)
class Waiting:
    """A message in the outbox; its ID is negative while it is in memory only."""

    id: int
    subject: str
    payload: bytes
    message_id: str


class Outbox:
    """The messages of one service that wait for the bus. Any thread may use it.

    Never raises for the sake of the disk: `fault` says what is wrong with it.

    Args:
        path: the database; its directory is made.
        max_messages, max_bytes: the bounds, of payloads.
    """

    def __init__(
        self, path: Path, max_messages: int, max_bytes: int, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._path = path
        self._bounds = (max_messages, max_bytes)
        self._memory_bound = memory_bytes
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._closed = False
        self._retry_at = 0.0
        self._on_disk = (0, 0)  # messages, bytes
        self._memory: deque[Waiting] = deque()
        self._memory_bytes = 0
        self._last_memory_id = 0
        self._removed: dict[int, Waiting] = {}  # published; the disk has yet to forget them
        self._lost_here = 0  # not yet added to those on disk
        self._lost_on_disk = 0
        self.lost_total = 0  # since the start
        self.corrupted_total = 0  # databases moved aside since the start
        self.fault: str | None = None
        with self._lock:
            self._settle()

    def put(self, messages: Iterable[Outgoing]) -> None:
        """Take messages in; what does not fit is counted as lost."""
        with self._lock:
            for message in messages:
                if not self._fits(message):
                    self._settle()
                if self._fits(message):
                    self._remember(message)
                else:
                    self._lost_here += 1
                    self.lost_total += 1
            self._settle()

    def oldest(self, limit: int) -> list[Waiting]:
        """Return the oldest messages."""
        with self._lock:
            self._settle()
            found = self._read(limit)
            return found + list(islice(self._memory, limit - len(found)))

    def remove(self, messages: Iterable[Waiting]) -> None:
        """Forget messages that have been published."""
        with self._lock:
            gone = {message.id: message for message in messages}
            self._removed |= {number: message for number, message in gone.items() if number > 0}
            self._memory = deque(m for m in self._memory if m.id not in gone)
            self._memory_bytes = sum(len(m.payload) for m in self._memory)
            self._settle()

    def lost(self) -> int:
        """Return how many messages were lost that no one has been told of."""
        with self._lock:
            return self._lost_here + self._lost_on_disk

    def told_of_lost(self, count: int) -> None:
        """Say that consumers have been told of so many lost messages."""
        with self._lock:
            self._lost_here -= count
            self._settle()

    def usage(self) -> tuple[int, int]:
        """Return how many messages and payload bytes wait, in memory and on disk."""
        with self._lock:
            return self._usage()

    def fullness(self) -> float:
        """Return how much of the bounds is taken, 0 to 1."""
        return max(used / bound for used, bound in zip(self.usage(), self._bounds, strict=True))

    def close(self) -> None:
        """Write what can be written, and let go of the database."""
        with self._lock:
            self._retry_at = 0.0
            self._settle()
            self._closed = True
            self._disconnect()

    def _usage(self) -> tuple[int, int]:
        count, size = self._on_disk
        count += len(self._memory) - len(self._removed)
        forgotten = sum(len(message.payload) for message in self._removed.values())
        return count, size + self._memory_bytes - forgotten

    def _fits(self, message: Outgoing) -> bool:
        count, size = self._usage()
        share = EXPENDABLE_SHARE if message.expendable else 1
        max_count, max_size = (bound * share for bound in self._bounds)
        size += len(message.payload)
        in_memory = self._memory_bytes + len(message.payload)
        return count < max_count and size <= max_size and in_memory <= self._memory_bound

    def _remember(self, message: Outgoing) -> None:
        self._last_memory_id -= 1
        self._memory.append(
            Waiting(self._last_memory_id, message.subject, message.payload, message.message_id)
        )
        self._memory_bytes += len(message.payload)

    def _settle(self) -> None:
        """Bring the disk up to date with the memory; leave all in memory if it refuses."""
        if self._closed or time.monotonic() < self._retry_at:
            return
        try:
            self._write(self._connected())
        except (sqlite3.Error, OSError) as error:
            self._refused(error)
        else:
            if self.fault:
                log.info("the outbox is on disk again", path=str(self._path))
            self.fault = None

    def _write(self, database: sqlite3.Connection) -> None:
        if not self._memory and not self._removed and not self._lost_here:
            return
        with database:  # one transaction
            database.execute("BEGIN IMMEDIATE")
            # By both: the numbers begin anew when a damaged database was moved aside.
            database.executemany(
                "DELETE FROM message WHERE id = ? AND message_id = ?",
                [(m.id, m.message_id) for m in self._removed.values()],
            )
            database.executemany(
                "INSERT INTO message (subject, message_id, payload) VALUES (?, ?, ?)",
                [(m.subject, m.message_id, m.payload) for m in self._memory],
            )
            database.execute("UPDATE lost SET count = count + ?", (self._lost_here,))
        self._on_disk = self._usage()
        self._lost_on_disk += self._lost_here
        self._lost_here = 0
        self._memory.clear()
        self._memory_bytes = 0
        self._removed.clear()

    def _read(self, limit: int) -> list[Waiting]:
        if self._database is None:
            return []
        try:
            rows = self._database.execute(
                "SELECT id, subject, payload, message_id FROM message ORDER BY id LIMIT ?",
                (limit + len(self._removed),),
            ).fetchall()
        except sqlite3.Error as error:
            self._refused(error)
            return []
        return [Waiting(*row) for row in rows if row[0] not in self._removed][:limit]

    def _connected(self) -> sqlite3.Connection:
        if self._database is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            database = sqlite3.connect(
                self._path, timeout=_BUSY, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(database)
            except BaseException:
                database.close()
                raise
            self._database = database
        return self._database

    def _prepare(self, database: sqlite3.Connection) -> None:
        database.executescript(_SCHEMA)
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise _damaged(found)
        row = database.execute("SELECT count FROM lost").fetchone()
        if row is None:
            database.execute("INSERT INTO lost VALUES (0)")
        self._lost_on_disk = row[0] if row else 0
        self._on_disk = database.execute(
            "SELECT count(*), coalesce(sum(length(payload)), 0) FROM message"
        ).fetchone()

    def _refused(self, error: sqlite3.Error | OSError) -> None:
        """Say what is wrong, and when to try again."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without its extension
        reason = f"{self._path}: {error}"
        self._retry_at = time.monotonic() + RETRY_DISK
        if code != sqlite3.SQLITE_FULL:  # a full disk can still be read
            self._disconnect()
        if code in _DAMAGED:
            self._move_aside(reason)
        elif reason != self.fault:
            mend = "stop the other process that uses it" if code == sqlite3.SQLITE_BUSY else _MEND
            log.error(
                "the outbox cannot be written, messages wait in memory", error=reason, mend=mend
            )
        self.fault = reason

    def _move_aside(self, reason: str) -> None:
        """Keep one damaged database for inspection; start a new one at once."""
        aside = self._path.with_name(self._path.name + ".corrupt")
        log.error("the outbox is damaged, what it held is lost", error=reason, kept=str(aside))
        self.corrupted_total += 1
        self._on_disk = (0, 0)
        self._lost_on_disk = 0
        self._removed.clear()
        try:
            for suffix in ("", "-wal", "-shm"):
                source = self._path.with_name(self._path.name + suffix)
                if source.exists():
                    source.replace(aside.with_name(aside.name + suffix))
        except OSError as error:
            log.error("cannot move it aside", error=str(error))
        else:
            self._retry_at = 0.0

    def _disconnect(self) -> None:
        if self._database is not None:
            try:
                self._database.close()
            except sqlite3.Error:
                log.warning("the outbox did not close in order", path=str(self._path))
            self._database = None


def _damaged(what: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(what)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error
