"""A TCP or TLS connection on which success means that every byte arrived.

Plain blocking sockets with deadlines, to be used from a thread: they can say what asyncio's
streams cannot, namely what the peer has confirmed.
"""

import errno
import fcntl
import os
import socket
import ssl
import struct
import time
from contextlib import suppress

from services.shipper.failure import Failure, Final, Passing

_POLL = 0.02  # seconds between looks at what the peer has not confirmed yet
_SIOCOUTQ = 0x5411  # asm-generic/ioctls.h; tcp(7): unsent and unacknowledged bytes
_READ_SIZE = 64 * 1024
_STILL_TALKS = "APPLICATION_DATA_AFTER_CLOSE_NOTIFY"  # SSL_shutdown(3): it had not heard our end


# tcp(7). A peer that is gone without a word is noticed after a minute, also while nothing is sent.
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 60_000),
)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


class Connection:
    """One connection, used for one work item at a time.

    Args:
        context: for TLS; None for plain TCP.
        server_name: name the certificate must have.
        min_rate: bytes a second that the receiver must take; deadlines grow with what is sent.
    """

    def __init__(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        server_name: str,
        min_rate: float,
    ) -> None:
        self._address = (host, port)
        self._context = context
        self._server_name = server_name
        self._min_rate = min_rate
        self._socket: socket.socket | None = None

    @property
    def _peer(self) -> str:
        return f"{self._address[0]} port {self._address[1]}"

    def open(self, timeout: float) -> None:
        """Connect, with the TLS handshake if there is one."""
        try:
            self._socket = socket.create_connection(self._address, timeout)
            _keep_alive(self._socket)
            if self._context is not None:
                self._socket = self._context.wrap_socket(
                    self._socket, server_hostname=self._server_name
                )
        except ssl.SSLCertVerificationError as error:
            raise Final(
                "certificate_rejected",
                f"{self._peer}: {error.verify_message}",
                "set CRASHBUS_SHIPPER_TLS_CA_FILE to the CA that signed the receiver's "
                "certificate, or CRASHBUS_SHIPPER_TLS_SERVER_NAME to the name it holds",
            ) from error
        except ssl.SSLError as error:
            raise Passing(
                "tls_failed", f"{self._peer}: {error}", "see whether the receiver speaks TLS there"
            ) from error
        except OSError as error:
            raise self._lost("cannot connect", error) from error

    def send(self, data: bytes, timeout: float) -> None:
        """Hand data to the kernel, all of it within `timeout` seconds and what its size takes."""
        assert self._socket is not None
        self._socket.settimeout(timeout + len(data) / self._min_rate)
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._lost("the connection broke", error) from error

    @property
    def is_usable(self) -> bool:
        """Whether a connection that was kept is still there, as far as can be seen from here.

        The peer has nothing to say; whatever can be read is its end, or not what we speak. Only
        TLS has words of its own, such as session tickets, which are read and passed over.
        """
        if self._socket is None:
            return False
        self._socket.settimeout(0)
        try:
            self._socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except ssl.SSLError as error:
            self._raise_alert(error)
            return False
        except OSError:
            return False
        return False

    def settle(self, timeout: float) -> None:
        """Return only if the peer's kernel has every byte; the connection stays open."""
        self._await_confirmation(timeout)
        if not self.is_usable:
            raise self._lost("the receiver ended it", OSError(errno.ECONNRESET, "closed early"))

    def finish(self, timeout: float, *, await_close: bool) -> None:
        """End the connection in order; return only if the peer's kernel has every byte.

        The peer then has `timeout` seconds to close its side, as receivers do when they have read
        all.

        Args:
            await_close: raise if it does not; or else take that its kernel has confirmed our end,
                too, for enough.
        """
        assert self._socket is not None
        self._await_confirmation(timeout)
        self._socket.settimeout(timeout)
        end = time.monotonic() + timeout
        try:
            if not isinstance(self._socket, ssl.SSLSocket) or self._end_tls(self._socket):
                self._socket.shutdown(socket.SHUT_WR)
            if self._is_closed_by(end):
                return
        except OSError as error:
            raise self._lost("the receiver did not take everything", error) from error
        if await_close:
            raise Passing(
                "not_closed",
                f"{self._peer}: all bytes are confirmed, but the receiver does not close",
                "see why it hangs, or give it more CRASHBUS_SHIPPER_TCP_CLOSE_TIMEOUT; for one "
                "that never closes set CRASHBUS_SHIPPER_TCP_AWAIT_CLOSE=false",
            )
        self._await_confirmation(timeout)

    def _end_tls(self, connection: ssl.SSLSocket) -> bool:
        """Say that this was all (RFC 8446, close_notify), and tell whether the peer said the same.

        An alert is another answer: with TLS 1.3 a receiver that wants a certificate says so only
        now, when all that was sent has arrived, and was thrown away.
        """
        try:
            connection.unwrap()  # what it returns is still an SSLSocket, but speaks plain TCP
        except TimeoutError:
            return False
        except ssl.SSLError as error:
            # It still talks, or has ended the connection without a word: what follows shows it.
            if not isinstance(error, ssl.SSLEOFError) and error.reason != _STILL_TALKS:
                raise self._tls_failed(error) from error
            return False
        return True

    def _tls_failed(self, error: ssl.SSLError) -> Failure:
        try:
            self._raise_alert(error)
        except Failure as failure:
            return failure
        return Passing("tls_failed", f"{self._peer}: {error}", "see the receiver's log")

    def _raise_alert(self, error: ssl.SSLError) -> None:
        """Raise what the peer says of us; that it ends without a word is no alert."""
        if "ALERT" not in (error.reason or ""):
            return
        text = f"{self._peer}: the receiver says {error.reason}"
        if any(word in error.reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")):
            mend = "set CRASHBUS_SHIPPER_TLS_CERT_FILE and _TLS_KEY_FILE to what it accepts"
            raise Final("certificate_refused", text, mend) from error
        raise Passing("tls_failed", text, "see the receiver's log") from error

    def _await_confirmation(self, timeout: float) -> None:
        assert self._socket is not None
        end = time.monotonic() + timeout + self._unconfirmed(self._socket) / self._min_rate
        while unconfirmed := self._unconfirmed(self._socket):
            if time.monotonic() > end:
                raise Passing(
                    "not_confirmed",
                    f"{self._peer}: {unconfirmed} bytes were not confirmed in time",
                    "see why the receiver does not read",
                )
            self._raise_pending_error(self._socket)
            time.sleep(_POLL)
        self._raise_pending_error(self._socket)

    @staticmethod
    def _unconfirmed(connection: socket.socket) -> int:
        answer = fcntl.ioctl(connection.fileno(), _SIOCOUTQ, struct.pack("i", 0))
        return int(struct.unpack("i", answer)[0])

    def _raise_pending_error(self, connection: socket.socket) -> None:
        number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise self._lost("the connection broke", OSError(number, os.strerror(number)))

    def _is_closed_by(self, end: float) -> bool:
        """Read until the peer closes, and tell whether it did. What it says is not asked for, but
        to close on unread data would reset the connection and could take from the peer what it
        has not read yet."""
        assert self._socket is not None
        try:
            while (left := end - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(_READ_SIZE):
                    return True
        except TimeoutError:
            return False
        except ssl.SSLError as error:
            raise self._tls_failed(error) from error
        return False

    def interrupt(self) -> None:
        """Make a call that blocks in another thread end now, with an error."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection up; what was not finished is cut off."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _lost(self, what: str, error: OSError) -> Passing:
        if isinstance(error, TimeoutError):
            reason, mend = "timeout", "see why the receiver does not answer"
        elif isinstance(error, ConnectionRefusedError):
            reason, mend = "refused", "start the receiver, or correct host and port"
        elif isinstance(error, socket.gaierror):
            reason, mend = "unknown_host", "correct the host, or mend the name service"
        else:
            reason, mend = "connection_lost", "see the receiver's log"
        text = error.strerror or str(error) or type(error).__name__
        return Passing(reason, f"{self._peer}: {what}: {text}", mend)
