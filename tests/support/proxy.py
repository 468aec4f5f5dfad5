"""A way to a server that can be made bad: slow, silent, cut, or changing what goes over it."""

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

PIECE = 64 * 1024  # bytes
LARGE = 4 * 1024  # bytes of a piece that has some of a chunk
_RESET = struct.pack("ii", 1, 0)  # socket(7): SO_LINGER with no time, so close sends a reset


@dataclass(eq=False)
class _Connection:
    client: socket.socket
    server: socket.socket
    up: int = 0  # bytes from the client so far
    asked: bool = False  # the client spoke last
    ends: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """End it as a router would that forgot it."""
        for end in (self.client, self.server):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RDWR)  # wakes a thread in recv
            end.close()

    def ended(self) -> None:
        """Close both sides when both directions have ended."""
        with self.lock:
            self.ends += 1
            if self.ends < 2:
                return
        self.client.close()
        self.server.close()


class Proxy:
    """Passes bytes on between clients and one server; two threads for each connection.

    Its attributes may be set at any moment and hold for open connections too.

    Attributes:
        latency: seconds before the first piece of each answer.
        rate: bytes a second in each direction of a connection; 0: as fast as it goes.
        refuses: a new connection is reset at once.
        reset_after: a connection is reset once so many bytes went up.
        loses_answers: what the server says is thrown away, and the connection reset.
        change_up: makes of a piece on its way to the server what arrives there.
        change_down: the same for the way back.
        done: what became of connections and pieces so far, by the words of the fault suite.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self.latency = 0.0
        self.rate = 0
        self.refuses = False
        self.reset_after: int | None = None
        self.loses_answers = False
        self.change_up: Callable[[bytes], bytes] | None = None
        self.change_down: Callable[[bytes], bytes] | None = None
        self.done: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._passing = threading.Event()
        self._passing.set()
        self._open: set[_Connection] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        """Pass nothing on from now on; connections stay open."""
        self._passing.clear()

    def restore(self) -> None:
        """Be a good way again."""
        self.latency, self.rate = 0.0, 0
        self.refuses, self.reset_after, self.loses_answers = False, None, False
        self.change_up = self.change_down = None
        self._passing.set()

    def cut(self) -> None:
        """Reset all connections that are open now."""
        for connection in list(self._open):
            self._count("connections cut")
            connection.reset()

    def unanswered(self) -> int:
        """Return on how many connections the client spoke last."""
        return sum(connection.asked for connection in list(self._open))

    def _count(self, what: str) -> None:
        with self._counting:
            self.done[what] += 1

    def close(self) -> None:
        """Stop listening and cut everything."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        self._passing.set()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if self.refuses:
                self._count("connections refused")
                raise ConnectionRefusedError
            server = socket.create_connection(("127.0.0.1", self._server_port), 10)
            server.settimeout(None)
        except OSError:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(client, server)
        self._open.add(connection)
        threading.Thread(target=self._pump, args=(connection, False), daemon=True).start()
        self._pump(connection, True)

    def _pump(self, connection: _Connection, up: bool) -> None:
        ends = (connection.client, connection.server)
        source, sink = ends if up else ends[::-1]
        try:
            while piece := source.recv(PIECE):
                if not self._passing.is_set():
                    self._count("pieces held back")
                    self._passing.wait()
                sink.sendall(self._passed(connection, piece, up))
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            connection.reset()
        finally:
            connection.ended()
            self._open.discard(connection)

    def _passed(self, connection: _Connection, piece: bytes, up: bool) -> bytes:
        """Return what becomes of a piece; raise OSError where the connection is to be reset."""
        if up:
            connection.up += len(piece)
            connection.asked = True
            if self.reset_after is not None and connection.up > self.reset_after:
                self._count("connections reset")
                raise ConnectionResetError
        elif self.loses_answers:
            self._count("answers lost")
            raise ConnectionResetError
        elif connection.asked:
            connection.asked = False
            time.sleep(self.latency)
        if self.rate:
            if len(piece) >= LARGE:
                self._count("large pieces slowed")
            time.sleep(len(piece) / self.rate)
        change = self.change_up if up else self.change_down
        return change(piece) if change else piece
