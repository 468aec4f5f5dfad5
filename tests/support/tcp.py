"""A TCP or TLS receiver, such as a Cribl Stream TCP source, that remembers what it got."""

import base64
import hashlib
import json
import socket
import ssl
import struct
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import zstandard


@dataclass(frozen=True)
class Certificates:
    """A CA and a server certificate that it signed.

    Attributes:
        name: what the server certificate is for, beside 127.0.0.1.
    """

    ca: Path
    certificate: Path
    key: Path
    name: str


def make_certificates(directory: Path, name: str = "receiver.test") -> Certificates:
    """Make them with the openssl command."""
    ca, ca_key = directory / "ca.pem", directory / "ca.key"
    key, request, certificate = (directory / one for one in ("tls.key", "tls.csr", "tls.pem"))
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    _openssl("req", "-x509", *new_key, "-keyout", ca_key, "-out", ca, "-subj", "/CN=Test CA")
    _openssl("req", "-new", *new_key, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
    names = directory / "names"
    names.write_text(f"subjectAltName=DNS:{name},IP:127.0.0.1\n")
    _openssl(
        *("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial"),
        *("-extfile", names, "-out", certificate),
    )
    return Certificates(ca, certificate, key, name)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class Receiver:
    """Listens from the start; every connection is read to its end in a thread of its own.

    Args:
        reset_after: reset each connection after so many bytes, as a crashing receiver would.
        stays_open: do not close a connection when the sender has ended it.

    Attributes:
        received: what each connection that ended brought, in the order in which they ended.
        accepted: how many connections there were.
    """

    def __init__(
        self,
        certificates: Certificates | None = None,
        *,
        port: int = 0,
        reset_after: int | None = None,
        stays_open: bool = False,
    ) -> None:
        self._context: ssl.SSLContext | None = None
        if certificates is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificates.certificate, certificates.key)
        self.reset_after = reset_after
        self._stays_open = stays_open
        self.received: list[bytes] = []
        self.accepted = 0
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The destination's URL."""
        return f"{'tls' if self._context else 'tcp'}://127.0.0.1:{self.port}"

    @property
    def lines(self) -> list[bytes]:
        """All lines of all connections, without their newlines."""
        return b"".join(self.received).splitlines()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        connection = plain
        with suppress(OSError):
            if self._context is not None:
                connection = self._context.wrap_socket(plain, server_side=True)
            data = self._read(connection)
            if data is None:
                return
            self.received.append(data)
            if self._stays_open:
                return
            if isinstance(connection, ssl.SSLSocket):
                connection.unwrap()
        connection.close()

    def _read(self, connection: socket.socket) -> bytes | None:
        """Read to the end; None if the connection was reset instead."""
        data = bytearray()
        while part := connection.recv(65536):
            data += part
            if self.reset_after is not None and len(data) > self.reset_after:
                linger = struct.pack("ii", 1, 0)  # socket(7): close sends a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.close()
                return None
        return bytes(data)

    def close(self) -> None:
        """Stop listening and drop what is open."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        for connection in self._open:
            connection.close()


def reassemble(received: list[bytes], name: str) -> bytes:
    """Put a core together as a receiver would, checking everything it is told."""
    frames = [json.loads(line)[name] for line in received]
    *chunks, end = frames
    core = bytearray()
    for index, frame in enumerate(chunks):
        stored = base64.b64decode(frame["data"])
        assert (frame["chunk"], frame["chunks"], frame["offset"]) == (index, len(chunks), len(core))
        assert hashlib.sha256(stored).hexdigest() == frame["sha256"]
        data = zstandard.decompress(stored) if frame["encoding"] == "zstd" else stored
        assert len(data) == frame["size"]
        core += data
    assert end["complete"] is True
    assert (end["size"], end["sha256"]) == (len(core), hashlib.sha256(core).hexdigest())
    return bytes(core)
