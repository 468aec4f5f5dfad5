"""NATS's client, so that nothing anyone publishes can make it deaf.

nats-py ends its reader, for ever and in silence, over bytes that nats-server lets pass. Each
method here closes one such gap of nats-py 2.15; all else is its own.
"""

import asyncio
import logging
import re
import ssl
from typing import Any

import nats.errors
from nats.aio.client import DEFAULT_INBOX_PREFIX
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.protocol import parser

from crashbus import names

RENEW_BEFORE = 30 * 86400.0  # seconds before a certificate's end, as the alert CertificateEnds

# nats-server takes a vertical tab and a form feed for part of a subject, Python's \s takes
# them for a space: a line that holds one would be no protocol at all.
_SUBJECTS = rb"[ \t]+([^ \t\r\n]+)[ \t]+([^ \t\r\n]+)[ \t]+(([^ \t\r\n]+)[ \t]+)?"
parser.MSG_RE = re.compile(rb"\AMSG" + _SUBJECTS + rb"(\d+)\r\n")
parser.HMSG_RE = re.compile(rb"\AHMSG" + _SUBJECTS + rb"(\d+)[ \t]+(\d+)\r\n")

_FROM_A_STREAM = b"$JS.ACK."
_STATUS = re.compile(r"[0-9]{3}")

# Said of every TLS connection that ends, about how nats-py begins it; nothing follows from it.
logging.getLogger("asyncio").addFilter(
    lambda record: "returning true from eof_received()" not in record.getMessage()
)


class Client(NatsClient):
    """A NATS client that hears on, whatever it hears."""

    refusals = 0  # times that the server did not permit a subject

    @property
    def is_listening(self) -> bool:
        """Whether it is connected and its reader is at work."""
        reader = self._reading_task
        return self.is_connected and reader is not None and not reader.done()

    @property
    def is_encrypted(self) -> bool:
        """Whether nothing can be read or changed on the way to the server."""
        return self._of_tls("ssl_object") is not None

    @property
    def certificate_end(self) -> float | None:
        """Unix time at which the server's certificate ends; None: it showed none."""
        certificate = self._of_tls("peercert")
        return ssl.cert_time_to_seconds(certificate["notAfter"]) if certificate else None

    def _of_tls(self, what: str) -> Any:
        writer = getattr(self._transport, "_io_writer", None)
        return writer.get_extra_info(what) if writer is not None else None

    def _setup_nkeys_seed_connect(self) -> None:
        """Keep answers to ourselves: each key may listen below its own inbox alone.

        With the usual prefix, who may hear its own answers hears those of all others.
        """
        super()._setup_nkeys_seed_connect()
        if bytes(self._inbox_prefix) == DEFAULT_INBOX_PREFIX and self._public_nkey:
            self._inbox_prefix = bytearray(DEFAULT_INBOX_PREFIX + b"." + self._public_nkey.encode())

    def _connect_command(self) -> bytes:
        """Say who we are, but never in the clear where TLS was asked for.

        The server's first line, which tells whether it wants TLS, is in the clear: whoever is
        on the way could leave it out, and nats-py would go on without.
        """
        server = self._current_server
        wanted = "tls" in self.options or (server is not None and server.uri.scheme == "tls")
        is_tls = self._server_info.get("tls_required") or self.options["tls_handshake_first"]
        if wanted and not is_tls:
            raise nats.errors.Error("nats: TLS is asked for, and the server offers none")
        command: bytes = super()._connect_command()
        return command

    async def _process_err(self, err_msg: str) -> None:
        """Come back after any error of the server's but a refusal of one subject.

        nats-py would close for good, as after a change of keys or too many connections.
        """
        if "permissions violation" in err_msg:
            self.refusals += 1
            await super()._process_err(err_msg)
        else:
            await self._process_op_err(nats.errors.Error(f"nats: {err_msg}"))

    async def _read_loop(self) -> None:
        await super()._read_loop()
        task = asyncio.current_task()
        cancelled = task is not None and task.cancelling()
        if self.is_connected and not cancelled:  # it failed over something not foreseen here
            await self._process_op_err(nats.errors.Error("the reader failed"))

    async def _process_headers(self, headers: Any) -> dict[str, str] | None:
        try:
            found: dict[str, str] | None = await super()._process_headers(headers)
        except (ValueError, IndexError):  # the first line is not UTF-8, or stands alone
            return self._parse_header_lines(headers.partition(b"\r\n")[2]) or None
        return found

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        return self.msg_class(
            subject=names.text(subject),
            reply=names.text(reply),
            data=data,
            headers=_trusted(headers, from_a_stream=reply.startswith(_FROM_A_STREAM)),
            _client=self,
            _sid=sid,
        )


def _trusted(headers: dict[str, str] | None, *, from_a_stream: bool) -> dict[str, str] | None:
    """Return headers without a status that only looks like the server's.

    The server's word to one who fetches is a header, which anyone can give to a message.
    """
    if not headers or "Status" not in headers:
        return headers
    if from_a_stream or not _STATUS.fullmatch(headers["Status"]):
        return {name: value for name, value in headers.items() if name != "Status"}
    return {"Description": "", **headers}
