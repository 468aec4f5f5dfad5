"""Cores that go straight to the bus, with no copy on disk.

The recorder reads the process's memory in the order of the core's file and hands it to the
collector (`services.common.core_stream`), which makes chunks of it as of any other file. The
process is held until all of it is on the bus, for only its memory can tell it again: to a collector
that was killed meanwhile the core is sent once more from its beginning, and where the bus cannot
take it, the caller still has all that is needed to do otherwise.
"""

import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from crashbus.parts import CrashFile
from services.common import core_stream
from services.common.core_stream import Announced, Answer
from services.recorder.core import core_reduced
from services.recorder.core.core_head import Head
from services.recorder.core.core_memory import (
    BLOCK,
    Found,
    Memory,
    PagesUnreadable,
    Piece,
    read_piece,
)
from services.recorder.core.core_pages import Pages
from services.recorder.handover.hold import Hold

_MOST_ZEROS = 4 * 1024**3  # bytes; more of what was never touched is left out: hashing takes long
_LOOK_EVERY = 0.25  # seconds between two looks whether a process is still held
_ATTEMPTS = 3  # with collectors that end in the middle
_HELD_FOR = 0.8  # of the time that a process may be held; the rest is to do otherwise


class NotSent(Exception):
    """The bus does not have the core, and why."""


class _Blocked(NotSent):
    """… and it would not take another just now either."""


class _Broken(Exception):
    """The collector has ended in the middle."""


class BusWay:
    """The way to the bus, by the collector; used by several threads.

    Args:
        patience: seconds without any progress after which a core goes another way.
        hold_deadline: seconds that a process may be held.
        always: take it for all cores, or for those alone that have no room on disk.
    """

    def __init__(self, spool: Path, patience: float, hold_deadline: float, *, always: bool) -> None:
        self.spool = spool
        self.patience = patience
        self.hold_deadline = hold_deadline
        self.always = always
        self._blocked_until = 0.0

    def block(self) -> None:
        """Let the crashes that follow not wait for what the last one waited for in vain."""
        self._blocked_until = time.monotonic() + self.patience

    @property
    def is_blocked(self) -> bool:
        """Whether there is no use in trying now."""
        return time.monotonic() < self._blocked_until


@dataclass(frozen=True)
class Sent:
    """A core that is on the bus.

    Attributes:
        size: that it should have, in bytes; it has less where the process ended meanwhile.
        missing: bytes of touched memory that it leaves out by its limit.
    """

    file: CrashFile
    size: int
    missing: int = 0


@dataclass(frozen=True)
class _Layout:
    """What the file consists of: its beginning, then memory, all else zeros."""

    beginning: bytes
    size: int
    pieces: Callable[[], Iterator[Piece]]
    missing: int = 0


def send(
    hold: Hold,
    way: BusWay,
    announced: Announced,
    pages: Pages,
    notes: int,
    limit: int,
    *,
    stacks_only: bool,
) -> Sent:
    """Send a core; returns when all of it is on the bus.

    Args:
        pages: with a head that has all bytes before the memory.
        notes: descriptor of a file that has the core's notes at their place.
        limit: bytes that it may have; a larger one is laid out anew, see `core_reduced`.

    Raises:
        NotSent: nothing of it stays on the bus.
    """
    if way.is_blocked:
        raise NotSent("it took no core a moment ago")
    try:
        with pages.opened() as (memory, touched):
            planned = _plan(pages.head, notes, touched, limit, stacks_only)
            sending = _Sending(hold, way, announced, memory)
            return Sent(sending.done(planned), planned.size, planned.missing)
    except PagesUnreadable as error:
        raise NotSent(f"its memory cannot be read: {error}") from error
    except _Blocked:
        way.block()
        raise


def _plan(head: Head, notes: int, touched: Found, limit: int, stacks_only: bool) -> _Layout:
    size = head.size or 0
    untouched = size - sum(load.size for load in touched.runs(head.loads()))
    if not stacks_only and size <= limit and untouched <= _MOST_ZEROS:
        return _Layout(head.raw, size, lambda: touched.pieces(head.loads()))
    reduced = core_reduced.plan(head, notes, touched, limit, stacks_only)
    beginning = bytearray(head.raw)
    for offset, raw in reduced.headers.items():
        beginning[offset : offset + len(raw)] = raw
    return _Layout(
        bytes(beginning),
        reduced.size,
        lambda: touched.pieces(iter(reduced.loads)),
        reduced.missing,
    )


class _Sending:
    """One core on its way, to one collector after the other if need be."""

    def __init__(self, hold: Hold, way: BusWay, announced: Announced, memory: Memory) -> None:
        self._hold = hold
        self._way = way
        self._announced = announced
        self._memory = memory
        self._buffer = bytearray(BLOCK)
        self._is_all_sent = False

    def done(self, planned: _Layout) -> CrashFile:
        for _ in range(_ATTEMPTS):
            connection = self._connected()
            try:
                return self._once(connection, planned)
            except _Broken:
                continue
            finally:
                connection.close()
        raise NotSent(f"the collector ended {_ATTEMPTS} times in the middle of it")

    def _connected(self) -> socket.socket:
        """Return a connection whose turn it is."""
        self._is_all_sent = False
        last = time.monotonic() + self._way.hold_deadline
        end = time.monotonic() + self._way.patience
        while True:
            try:
                connection = core_stream.connect(self._way.spool, _LOOK_EVERY)
            except FileNotFoundError as error:  # it is not even being started again
                raise NotSent("there is no collector that takes cores") from error
            except OSError as error:
                self._wait(end, f"the collector takes no cores: {error.strerror or error}")
                time.sleep(_LOOK_EVERY)
                continue
            try:
                while (told := self._received(connection, 1, end)) == core_stream.QUEUED:
                    end = min(last, time.monotonic() + self._way.patience)
                if told == core_stream.GREETING:
                    return connection
                self._wait(end, "the collector takes no more cores")
            except BaseException:
                connection.close()
                raise
            connection.close()
            time.sleep(_LOOK_EVERY)

    def _once(self, connection: socket.socket, planned: _Layout) -> CrashFile:
        self._is_all_sent = False
        try:
            self._text(connection, self._announced.model_dump_json().encode())
            self._content(connection, planned)
            self._frame(connection, core_stream.END, 0)
        except OSError:  # it may have said why
            pass
        return self._answered(connection)

    def _content(self, connection: socket.socket, planned: _Layout) -> None:
        """Send the file, up to where the process's memory goes."""
        view = memoryview(planned.beginning)
        for place in range(0, len(view), core_stream.MAX_DATA):
            self._data(connection, view[place : place + core_stream.MAX_DATA])
        place = len(view)
        try:
            for piece in planned.pieces():
                into = memoryview(self._buffer)[: piece.size]
                if not self._read(piece, into):
                    return
                self._frame(connection, core_stream.ZEROS, piece.offset - place)
                self._data(connection, into)
                place = piece.offset + piece.size
        except PagesUnreadable:
            if not self._memory.is_gone():
                raise
            return
        self._frame(connection, core_stream.ZEROS, planned.size - place)

    def _read(self, piece: Piece, into: memoryview) -> bool:
        try:
            return read_piece(self._memory, piece, into)
        except OSError as error:
            raise PagesUnreadable(f"memory: {error.strerror}") from error

    def _text(self, connection: socket.socket, text: bytes) -> None:
        header = core_stream.FRAME.pack(core_stream.ANNOUNCED, len(text))
        self._send(connection, memoryview(header + text))

    def _data(self, connection: socket.socket, data: memoryview) -> None:
        self._frame(connection, core_stream.DATA, len(data))
        self._send(connection, data)

    def _frame(self, connection: socket.socket, kind: bytes, size: int) -> None:
        if size or kind == core_stream.END:
            self._send(connection, memoryview(core_stream.FRAME.pack(kind, size)))

    def _send(self, connection: socket.socket, data: memoryview) -> None:
        end = time.monotonic() + self._way.patience
        while data:
            self._wait(end, "the bus does not go on")
            if _is_ready(connection, select.POLLOUT):
                sent = connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                data, end = data[sent:], time.monotonic() + self._way.patience

    def _answered(self, connection: socket.socket) -> CrashFile:
        self._is_all_sent = True
        end, text = time.monotonic() + self._way.patience, b""
        while more := self._received(connection, core_stream.MAX_TEXT, end):
            text += more
            if len(text) > core_stream.MAX_TEXT:
                break
        if not text:
            raise _Broken
        try:
            answer = Answer.model_validate_json(text)
        except ValidationError as error:
            raise _Broken from error
        if answer.file is None:
            raise (_Blocked if answer.is_blocked else NotSent)(answer.fault)
        return answer.file

    def _received(self, connection: socket.socket, size: int, end: float) -> bytes:
        """Return what comes; nothing when the collector has ended."""
        while not _is_ready(connection, select.POLLIN):
            self._wait(end, "the collector does not answer")
        try:
            return connection.recv(size)
        except OSError:
            return b""

    def _wait(self, end: float, because: str) -> None:
        """See to it that nothing is waited for without end, also if all goes slowly.

        A wait that has its own bound is no thread that stands still.
        """
        now = self._hold.last_progress = time.monotonic()
        if now > end:
            raise _Blocked(f"{because} (CRASHBUS_RECORDER_CORE_TO_PATIENCE)")
        if self._is_all_sent:
            return
        if not self._hold.has_memory:
            raise NotSent(f"the process is gone: {self._hold.let_go_because or 'it was killed'}")
        if self._hold.is_held and self._hold.age > self._way.hold_deadline * _HELD_FOR:
            raise NotSent(f"it takes longer than {self._hold.age:.0f} s")


def _is_ready(connection: socket.socket, events: int) -> bool:
    waiting = select.poll()
    waiting.register(connection, events)
    return bool(waiting.poll(_LOOK_EVERY * 1000))
