"""One connection to ``crashbus receive``, read in a thread of its own.

Blocking sockets, for they can say what asyncio's streams cannot: over TLS those answer a sender's
end at once, before what it sent is stored.
"""

import io
import socket
import ssl
import struct
import threading
import time
from contextlib import suppress
from typing import Any

from crashbus import frames
from crashbus.cli.receiver import MAX_LINE, Receiving, Refused
from crashbus.cli.terminal import console, plain
from crashbus.frames import BadFrame

_RESET = struct.pack("ii", 1, 0)  # socket(7): SO_LINGER with no time, so that close sends a reset
_HANDSHAKE = 30.0  # seconds for TLS to begin
_PAUSE = 1.0  # seconds without a word after which small files are taken to be all of their crash
_SILENCE = 3600.0  # seconds; a kept connection waits for the next crash
_SILENCE_IN_CORE = 300.0  # seconds; a shipper may wait for the bus between two chunks
_WHOLE = 300.0  # seconds for a line or frame; a shipper's own deadline for the longest is 210
_LEAST_RATE = 32 * 1024  # bytes a second; a shipper itself gives up below twice as many
_GOODBYE = 5.0  # seconds for the sender to hear that we end TLS
_BUFFER = 64 * 1024

# A line of JSON may take many times its size, so they are read one at a time.
_parsing = threading.Lock()


class Sender:
    """Whoever sends over one connection.

    Attributes:
        came: monotonic seconds of its connection.
        has_spoken: whether a line or frame of it has come whole.
        idle_since: monotonic seconds since which it has nothing to say and all is stored; None
            while it has.
    """

    def __init__(
        self, connection: socket.socket, context: ssl.SSLContext | None, receiving: Receiving
    ) -> None:
        self._socket = connection
        self._context = context
        self._receiving = receiving
        self._source = _Source(connection)
        self._reader = io.BufferedReader(self._source, _BUFFER)
        self._hung_up = False
        self.came = time.monotonic()
        self.has_spoken = False
        self.idle_since: float | None = None

    def serve(self) -> None:
        """Take what it sends until it ends; what is stored then is whole."""
        whole = False
        try:
            self._begin()
            while self._take_one():
                self.has_spoken = True
            self._receiving.end()
            whole = True
        except (Refused, BadFrame, OSError, EOFError) as error:
            text = plain(str(error) or type(error).__name__)
            told = f"{self._receiving.peer}: {text}; connection reset, the sender tries again"
            console(stderr=True).print(told, soft_wrap=True)
        finally:
            self._receiving.give_up()
            self._close(whole)

    def is_silent(self, since: float) -> bool:
        """Tell whether it came before that, and has said nothing whole, nor is about to."""
        slow = self._source.taken < _LEAST_RATE * (time.monotonic() - self.came)
        return slow and not self.has_spoken and self.came < since

    def hang_up(self) -> None:
        """Let it end as if the sender had ended it; callable from any thread.

        What came until then is taken, for the sender may count it as delivered.
        """
        self._hung_up = True
        with suppress(OSError):  # it has ended
            # Not SSLSocket's own, which would take TLS from under the thread that reads.
            socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def _begin(self) -> None:
        if self._context is not None:
            self._socket.settimeout(_HANDSHAKE)
            # Known before it shakes hands, so that whoever hangs up ends that, too.
            self._socket = wrapped = self._context.wrap_socket(
                self._socket, server_side=True, do_handshake_on_connect=False
            )
            if self._hung_up:
                raise EOFError("hung up on before TLS began")
            wrapped.do_handshake()
            self._source.socket = wrapped

    def _take_one(self) -> bool:
        """Take one line or frame; return whether there was one."""
        first = self._first()
        if not first:
            return False
        self._source.within(_WHOLE)
        if first == frames.MAGIC[:1]:
            head = first + self._exactly(frames.HEAD.size - 1)
            text, body = frames.lengths(head)
            told = self._exactly(text)
            self._receiving.frame(frames.read(told, self._exactly(body)))
            return True
        line = first + self._reader.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise Refused(f"a line is cut short, or longer than {MAX_LINE} bytes")
        with _parsing:
            self._receiving.line(line)
        return True

    def _first(self) -> bytes:
        """Return the first byte of what comes next; none when nothing does."""
        self._source.within(_PAUSE)
        try:
            return self._reader.read(1)
        except TimeoutError:
            self._receiving.store_small()
        if self._receiving.is_in_core:
            self._source.within(_SILENCE_IN_CORE)
            return self._reader.read(1)
        self._source.within(_SILENCE)
        self.idle_since = time.monotonic()
        try:
            return self._reader.read(1)
        except TimeoutError:
            return b""  # all is stored: a shipper that kept the connection makes another
        finally:
            self.idle_since = None

    def _exactly(self, size: int) -> bytes:
        data = self._reader.read(size)
        if len(data) < size:
            raise EOFError("the connection ended in the midst of a frame")
        return data

    def _close(self, whole: bool) -> None:
        """End in order, or so that the sender knows that not all was taken."""
        if not whole:
            reset(self._socket)
            return
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.settimeout(_GOODBYE)
            try:
                self._socket.unwrap()
            except ssl.SSLEOFError:  # it ended the connection without a word of TLS
                pass
            except OSError:  # it does not listen, or speaks on, and what it says is thrown away
                reset(self._socket)
                return
        self._socket.close()


def reset(connection: socket.socket) -> None:
    """End a connection so that its peer knows that not all was taken."""
    with suppress(OSError):  # it was closed: TLS could not begin
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()


class _Source(io.RawIOBase):
    """What comes over a socket, up to a deadline for all that is read."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.taken = 0  # bytes
        self._end = 0.0

    def within(self, seconds: float) -> None:
        """Set the deadline."""
        self._end = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("silent, or slow, for too long")
        self.socket.settimeout(left)
        taken = self.socket.recv_into(buffer)
        self.taken += taken
        return taken
