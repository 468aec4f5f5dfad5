"""A connection on which success means that every byte arrived."""

import ctypes
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from services.shipper.destinations import connection as module
from services.shipper.destinations.connection import Connection
from services.shipper.failure import Passing
from tests.support.tcp import Certificates, make_certificates
from tests.support.wait import until

MIB = 1024 * 1024
ANY_RATE = 1 << 40  # bytes a second; then what is sent gets no time for its size
SO_ATTACH_FILTER = 26  # asm-generic/socket.h


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@contextmanager
def connected(
    min_rate: float = ANY_RATE, tls: Certificates | None = None
) -> Iterator[tuple[Connection, socket.socket]]:
    """Give a connection and the socket at its other end, whose kernel holds little unread."""
    context = ssl.create_default_context(cafile=tls.ca) if tls else None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        port = listener.getsockname()[1]
        made = Connection("127.0.0.1", port, context, tls.name if tls else "", min_rate)
        opening = threading.Thread(target=made.open, args=(10,))
        opening.start()
        peer, _ = listener.accept()
        if tls is not None:
            server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            server.load_cert_chain(tls.certificate, tls.key)
            peer = server.wrap_socket(peer, server_side=True)
        opening.join()
        with peer:
            yield made, peer
        made.close()


def vanish(peer: socket.socket) -> None:
    """Let nothing come to a socket any more, as if its host had lost its power."""
    drop_all = struct.pack("HBBI", 0x06, 0, 0, 0)  # linux/filter.h: BPF_RET | BPF_K, nothing
    program = ctypes.create_string_buffer(drop_all)
    told = struct.pack("HxxxxxxQ", 1, ctypes.addressof(program))
    peer.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, told)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second where it is a minute."""
    values = (1, 1, 1, 1500)
    shorter = [
        (option, value) for (option, _), value in zip(module._KEEPALIVE, values, strict=True)
    ]
    monkeypatch.setattr(module, "_KEEPALIVE", shorter)


def test_peer_that_is_gone_without_a_word_is_noticed_within_a_minute_or_so() -> None:
    with connected() as (made, _):
        assert made._socket is not None

        def option(name: int) -> int:
            assert made._socket is not None
            return made._socket.getsockopt(socket.IPPROTO_TCP, name)

        assert made._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, every, tries = map(
            option, (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + every * tries <= 60
        assert option(socket.TCP_USER_TIMEOUT) <= 60_000


async def test_kept_connection_whose_peer_vanished_is_not_used(impatient: None) -> None:
    """While nothing is sent: tcp(7), SO_KEEPALIVE."""
    with connected() as (made, peer):
        assert made.is_usable
        vanish(peer)

        await until(lambda: not made.is_usable, within=15)


def test_bytes_that_a_vanished_peer_does_not_confirm_are_not_waited_for_for_ever(
    impatient: None,
) -> None:
    """While something is on its way: tcp(7), TCP_USER_TIMEOUT."""
    with connected() as (made, peer):
        vanish(peer)
        made.send(b"x", 1)

        with pytest.raises(Passing, match="the connection broke") as raised:
            made.finish(200, await_close=True)

    assert raised.value.reason == "timeout"


def reading_late(peer: socket.socket, after: float) -> Callable[[], None]:
    """Let a peer begin to read after some seconds; return what waits for its end."""

    def read() -> None:
        while peer.recv(MIB):
            pass
        peer.close()

    timer = threading.Timer(after, read)
    timer.start()
    return timer.join


@pytest.mark.parametrize("min_rate", [8 * MIB, ANY_RATE])
def test_deadline_to_send_grows_with_what_is_sent(min_rate: int) -> None:
    data = bytes(24 * MIB)  # tcp(7): the kernels hold 4 and 6 MiB of it at most
    with connected(min_rate) as (made, peer):
        ended = reading_late(peer, after=1.0)
        if min_rate == ANY_RATE:
            with pytest.raises(Passing) as raised:
                made.send(data, timeout=0.2)
            assert raised.value.reason == "timeout"
        else:
            made.send(data, timeout=0.2)  # and three seconds
        made.close()
        ended()


@pytest.mark.parametrize("min_rate", [MIB // 4, ANY_RATE])
def test_deadline_for_confirmation_grows_with_what_is_not_confirmed(min_rate: int) -> None:
    with connected(min_rate) as (made, peer):
        ended = reading_late(peer, after=1.0)
        made.send(bytes(MIB), timeout=10)  # into the kernel
        if min_rate == ANY_RATE:
            with pytest.raises(Passing) as raised:
                made.finish(0.2, await_close=True)
            assert raised.value.reason == "not_confirmed"
        else:
            made.finish(0.2, await_close=True)
        made.close()
        ended()


def test_peer_that_does_not_close_has_to_unless_it_is_said_otherwise() -> None:
    for await_close in (True, False):
        with connected() as (made, peer):
            made.send(b"all", 1)
            if await_close:
                with pytest.raises(Passing) as raised:
                    made.finish(0.2, await_close=True)
                assert raised.value.reason == "not_closed"
            else:
                made.finish(0.2, await_close=False)
            assert peer.recv(10) == b"all"
            assert peer.recv(10) == b""  # our end was in order


def test_peer_whose_end_of_ours_is_not_confirmed_has_not_taken_it() -> None:
    """Not even where receivers never close."""
    with connected() as (made, peer):
        made.send(b"all", 1)
        assert peer.recv(10) == b"all"
        made._await_confirmation(1)
        vanish(peer)

        with pytest.raises(Passing) as raised:
            made.finish(0.2, await_close=False)

    assert raised.value.reason == "not_confirmed"


def test_tls_that_breaks_at_the_end_is_no_success(certificates: Certificates) -> None:
    with connected(tls=certificates) as (made, peer):
        made.send(b"all", 1)
        assert peer.recv(10) == b"all"
        os.write(peer.fileno(), b"HTTP/1.1 400 no TLS, whatever this is\r\n" * 10)

        with pytest.raises(Passing) as raised:
            made.finish(2, await_close=True)

    assert raised.value.reason == "tls_failed"


@pytest.mark.parametrize("says", [b"", b"thanks"])
def test_tls_peer_that_closes_without_a_word_or_after_a_word_is_content(
    certificates: Certificates, says: bytes
) -> None:
    """Not all send close_notify; what they say before is not asked for."""
    with connected(tls=certificates) as (made, peer):

        def serve() -> None:
            while peer.recv(100):
                if says:
                    peer.send(says)
            peer.shutdown(socket.SHUT_RDWR)

        serving = threading.Thread(target=serve)
        serving.start()
        made.send(b"all", 1)
        made.finish(5, await_close=True)
        serving.join()


def test_tls_peer_that_waits_for_our_fin_gets_it(certificates: Certificates) -> None:
    """It has answered close_notify, and closes when TCP ends, too."""
    with connected(tls=certificates) as (made, peer):

        def serve() -> None:
            assert isinstance(peer, ssl.SSLSocket)
            while peer.recv(100):
                pass
            with peer.unwrap() as plain:
                plain.settimeout(30)
                while plain.recv(100):
                    pass

        serving = threading.Thread(target=serve)
        serving.start()
        made.send(b"all", 1)
        try:
            made.finish(5, await_close=True)
        finally:
            made.close()
            serving.join()
