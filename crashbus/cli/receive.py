"""``crashbus receive``: take what shippers send over TCP or TLS, and store it as files."""

import errno
import os
import signal
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from crashbus.cli.errors import Trouble
from crashbus.cli.receiver import Limits, Receiving
from crashbus.cli.sender import Sender, reset
from crashbus.cli.terminal import console, plain

_ROOM_WITHIN = 1.0  # seconds for a sender that is hung up on, or was about to end, to be gone
_SPEAKS_WITHIN = 5.0  # seconds; until then nobody is taken for one who only holds a place
_STOP_WITHIN = 5.0  # seconds for all to be gone: a write may be under way
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # by the kernel's command line; by sysctl
_MIB = 1024 * 1024


def receive(
    into: Annotated[Path, typer.Argument(help="Directory to store files below.")],
    listen: Annotated[str, typer.Option(help="host:port to listen on.")] = "127.0.0.1:10060",
    tls_cert: Annotated[Path | None, typer.Option(help="Speak TLS, with this certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's private key.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="Take only senders with a certificate of this CA.")
    ] = None,
    max_file: Annotated[int, typer.Option(min=1, help="MiB that one file may have.")] = 262144,
    keep_free: Annotated[int, typer.Option(min=0, help="MiB of the disk to leave free.")] = 1024,
    connections: Annotated[
        int,
        typer.Option(
            min=1,
            help="Senders at a time. Each can take 80 MiB of memory; and the one whose line is "
            "read as JSON, one at a time, 1.5 GiB if it means harm.",
        ),
    ] = 32,
) -> None:
    """Receive crash files over TCP, and put core dumps together again.

    A core is stored only if every chunk and the whole are what was sent. Small files come as
    AppScope's daemon sends them, without a hash: JSON as the same value, text as the same lines.
    """
    host, _, port = listen.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise Trouble(f"{listen!r} names no port", "give --listen host:port")
    limits = Limits(max_file * _MIB, keep_free * _MIB)
    context = _tls(tls_cert, tls_key, client_ca)
    try:
        into.mkdir(0o750, parents=True, exist_ok=True)
        _Receiver(into, limits, context, connections).run(host.strip("[]"), int(port))
    except OSError as error:
        raise Trouble(f"cannot receive: {error}", "choose another address or directory") from error


def _tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> ssl.SSLContext | None:
    if cert is None:
        if key or client_ca:
            raise Trouble("--tls-key and --client-ca are for TLS", "give --tls-cert, too")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise Trouble(f"the certificates cannot be used: {error}", "give PEM files") from error
    return context


class _Receiver:
    """Listens, and reads each sender in a thread of its own.

    Args:
        most: senders at a time.
    """

    def __init__(
        self, into: Path, limits: Limits, context: ssl.SSLContext | None, most: int
    ) -> None:
        self._into = into
        self._limits = limits
        self._context = context
        self._free = threading.Semaphore(most)
        self._senders: dict[Sender, threading.Thread] = {}
        self._ended = threading.Event()

    def run(self, host: str, port: int) -> None:
        """Receive until SIGINT or SIGTERM."""
        ends = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # of all threads from here on
        sockets = _listening(host, port)
        try:
            place = sockets[0].getsockname()
            where = f"receiving on {place[0]}:{place[1]}, storing below {plain(str(self._into))}"
            console(stderr=True).print(where, soft_wrap=True)
            for one in sockets:
                threading.Thread(target=self._accept, args=(one,), daemon=True).start()
            signal.sigwait(ends)
        finally:
            self._end(sockets)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _accept(self, listening: socket.socket) -> None:
        while not self._ended.is_set():
            try:
                connection, peer = listening.accept()
            except OSError:  # it was closed, the peer has gone, or there are too many files
                self._ended.wait(0.1)
                continue
            if not self._ended.is_set() and self._has_room():
                self._serve(connection, str(peer[0]))
            else:
                reset(connection)

    def _has_room(self) -> bool:
        """Take a place for a sender, where there is none that of another who does not need it."""
        if self._free.acquire(blocking=False):
            return True
        if (needless := self._needless()) is not None:
            needless.hang_up()
        return self._free.acquire(timeout=_ROOM_WITHIN)

    def _needless(self) -> Sender | None:
        """Return who has had nothing to say for the longest, which takes nothing from a shipper
        that kept the connection; else who came first of those that have not said one thing whole.
        """
        there = [*self._senders]
        idle = [(since, one) for one in there if (since := one.idle_since) is not None]
        before = time.monotonic() - _SPEAKS_WITHIN
        silent = [(one.came, one) for one in there if one.is_silent(before)]
        return min(idle or silent, key=lambda found: found[0], default=(0.0, None))[1]

    def _serve(self, connection: socket.socket, peer: str) -> None:
        sender = Sender(connection, self._context, Receiving(self._into, peer, self._limits, _tell))

        def serve() -> None:
            try:
                sender.serve()
            finally:
                del self._senders[sender]
                self._free.release()

        self._senders[sender] = thread = threading.Thread(target=serve, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # this process may have no more threads
            del self._senders[sender]
            self._free.release()
            reset(connection)

    def _end(self, sockets: list[socket.socket]) -> None:
        self._ended.set()
        for listening in sockets:
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
            listening.close()
        end, left = time.monotonic() + _STOP_WITHIN, [*self._senders.items()]
        for sender, _ in left:
            sender.hang_up()
        for _, thread in left:
            thread.join(max(0.0, end - time.monotonic()))


def _listening(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address of the host; all of this host's without a name."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = dict.fromkeys((family, place) for family, _, _, _, place in found)
    sockets, lacking = [], None
    for family, place in addresses:
        try:
            sockets.append(socket.create_server(place[:2], family=family))
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
            lacking = error
    if lacking is not None and not sockets:
        raise lacking
    return sockets


def _tell(path: Path) -> None:
    console().print(plain(os.fspath(path)), soft_wrap=True)
