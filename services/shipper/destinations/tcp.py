"""Destinations ``tcp://host:port`` and ``tls://host:port``: AppScope's newline-delimited JSON.

One connection for each work item: the small files of a crash, as AppScope's daemon does it, or a
core. It counts as delivered when the receiver's kernel has confirmed every byte and the receiver
has closed its side, too. More cannot be known over raw TCP: a receiver that dies after its kernel
took the bytes loses them, and one that gets an item twice, because a shipper died between sending
and acknowledging, sees its lines twice.

Where connections are kept, one serves item after item, and only what the receiver's kernel has
confirmed is known; so it is where a receiver never closes, if that is set.
"""

import asyncio
import ssl
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from crashbus import frames
from crashbus.destination import Destination
from crashbus.layout import Kind
from crashbus.parts import CrashFile
from services.common.settings import SettingsError
from services.shipper.destinations import lines
from services.shipper.destinations.base import Deliverer
from services.shipper.destinations.connection import Connection
from services.shipper.failure import Unfit
from services.shipper.settings import MIB, ShipperSettings
from services.shipper.source import Source
from services.shipper.threads import run_whole

MAX_KEPT = 4  # connections that wait for the next crash
MAX_SMALL = 16 * MIB  # bytes of one item's small files: all are verified before any is sent


class TcpDeliverer(Deliverer):
    """Delivers lines to a receiver."""

    shows_repeats = True

    def __init__(self, destination: Destination, settings: ShipperSettings) -> None:
        super().__init__(destination)
        self._settings = settings
        self._context = _tls_context(settings) if destination.scheme == "tls" else None
        # Reading JSON takes many times its size, so only one item does it at a time.
        self._encoding = asyncio.Semaphore(1)
        self._kept: list[Connection] = []  # in nobody's hands just now

    async def check(self) -> None:
        connection = self._connection()
        try:
            await run_whole(
                connection.open, self._settings.tcp_connect_timeout, interrupt=connection.interrupt
            )
        finally:
            await run_whole(connection.close)

    async def deliver(self, folder: str, sources: Sequence[Source]) -> None:
        """Deliver files in the order of their names, core dumps last.

        The small files are read and verified before the connection is made.
        """
        ordered = sorted(sources, key=lambda source: source.file.name)
        small = await self._contents([one for one in ordered if one.file.kind is not Kind.CORE])
        cores = [one for one in ordered if one.file.kind is Kind.CORE]
        self._refuse_unwanted(cores)
        connection = self._kept.pop() if self._kept else self._connection()
        try:
            await self._have_open(connection)
            for source, content in small:
                await self._send_small(connection, source, content)
            for core in cores:
                await self._send_core(connection, folder, core)
            await self._end(connection)
        except BaseException:
            await run_whole(connection.close)
            raise

    async def _have_open(self, connection: Connection) -> None:
        if connection.is_usable:
            return
        await run_whole(connection.close)
        timeout = self._settings.tcp_connect_timeout
        await run_whole(connection.open, timeout, interrupt=connection.interrupt)

    async def _end(self, connection: Connection) -> None:
        """See that all has arrived; then keep the connection, or end it."""
        keep, timeout = self._settings.tcp_keep, self._settings.tcp_close_timeout
        finish = partial(connection.finish, await_close=self._settings.tcp_await_close)
        end = connection.settle if keep else finish
        await run_whole(end, timeout, interrupt=connection.interrupt)
        if keep and len(self._kept) < MAX_KEPT:
            self._kept.append(connection)
        else:
            await run_whole(connection.close)

    async def _contents(self, sources: Sequence[Source]) -> list[tuple[Source, bytes]]:
        left, result = MAX_SMALL, []
        for source in sources:
            content = await self._content(source, left)
            left -= len(content)
            result.append((source, content))
        return result

    async def _content(self, source: Source, limit: int) -> bytes:
        content = bytearray()
        async with aclosing(source.pieces()) as pieces:
            async for piece in pieces:
                if len(content) + len(piece.data) > limit:
                    raise Unfit(
                        source.file,
                        "file_too_large",
                        f"a crash's small files have more than {MAX_SMALL} bytes together",
                        "take it from a destination that stores files",
                    )
                content += piece.data
        return bytes(content)

    def _refuse_unwanted(self, cores: Sequence[Source]) -> None:
        if cores and not self.destination.wants_core:
            mend = f"add ?core=ndjson to {self.destination.url} where cores are wanted"
            raise Unfit(cores[0].file, "core_not_wanted", "core dumps are not sent there", mend)

    async def _send_small(self, connection: Connection, source: Source, content: bytes) -> None:
        async with self._encoding:
            pieces = await run_whole(lines.small_file, source.file.name, content)

        timeout = self._settings.tcp_write_timeout

        def send_all() -> None:
            for piece in pieces:
                connection.send(piece, timeout)

        await run_whole(send_all, interrupt=connection.interrupt)

    async def _send_core(self, connection: Connection, folder: str, source: Source) -> None:
        """Send a core; its last frame, which makes it whole, only once the hash is known good."""
        timeout, file = self._settings.tcp_write_timeout, source.file
        frame = frames.binary if self.destination.binary_core else frames.line

        def send(told: dict[str, Any], stored: bytes) -> None:
            connection.send(frame(told, stored), timeout)

        async with aclosing(source.pieces()) as pieces:
            async for piece in pieces:
                told = lines.core_chunk(source.crash_id, folder, file, piece)
                await run_whole(send, told, piece.stored, interrupt=connection.interrupt)
        end = lines.core_end(source.crash_id, folder, file)
        await run_whole(send, end, b"", interrupt=connection.interrupt)

    def _connection(self) -> Connection:
        to, settings = self.destination, self._settings
        name = settings.tls_server_name or to.host
        return Connection(to.host, to.port, self._context, name, settings.tcp_min_rate)

    def url_of(self, folder: str, file: CrashFile) -> str:
        return f"{self.destination.scheme}://{self._place()}#{file.name}"

    def _place(self) -> str:
        return self.destination.url.partition("://")[2].partition("?")[0]


def _tls_context(settings: ShipperSettings) -> ssl.SSLContext:
    ca_file = settings.tls_ca_file
    try:
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    except OSError as error:
        raise SettingsError(f"CRASHBUS_SHIPPER_TLS_CA_FILE names {ca_file}: {error}") from None
    _show_certificate(context, settings)
    if not settings.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _show_certificate(context: ssl.SSLContext, settings: ShipperSettings) -> None:
    certificate, key = settings.tls_cert_file, settings.tls_key_file
    if certificate is None:
        if key is not None:
            raise SettingsError("CRASHBUS_SHIPPER_TLS_KEY_FILE is set, but no certificate for it")
        return
    try:
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise SettingsError(
            f"CRASHBUS_SHIPPER_TLS_CERT_FILE and _TLS_KEY_FILE ({certificate}, {key}): {error}"
        ) from None
