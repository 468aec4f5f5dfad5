"""``crashbus receive``: take what shippers send over TCP or TLS, and store it as files."""

import asyncio
import os
import signal
import socket
import ssl
import struct
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from crashbus import frames
from crashbus.cli.errors import Trouble
from crashbus.cli.receiver import MAX_LINE, Limits, Receiving, Refused
from crashbus.cli.terminal import console, plain
from crashbus.frames import BadFrame

_RESET = struct.pack("ii", 1, 0)  # socket(7): SO_LINGER with no time, so that close sends a reset
_SILENCE = 3600.0  # seconds; a kept connection waits for the next crash
_PAUSE = 1.0  # seconds without a word after which small files are taken to be all of their crash
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
    if not port.isdigit():
        raise Trouble(f"{listen!r} names no port", "give --listen host:port")
    limits = Limits(max_file * _MIB, keep_free * _MIB)
    context = _tls(tls_cert, tls_key, client_ca)
    try:
        into.mkdir(0o750, parents=True, exist_ok=True)
        asyncio.run(_serve(host.strip("[]"), int(port), into, limits, context, connections))
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


async def _serve(
    host: str,
    port: int,
    into: Path,
    limits: Limits,
    context: ssl.SSLContext | None,
    connections: int,
) -> None:
    senders = 0
    parsing = asyncio.Lock()  # a line of JSON may take many times its size

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal senders
        if senders >= connections:
            _close(writer, whole=False)
            return
        senders += 1
        try:
            await _serve_one(reader, writer, Receiving(into, _peer(writer), limits, _tell), parsing)
        finally:
            senders -= 1

    server = await asyncio.start_server(serve, host, port, limit=MAX_LINE, ssl=context)
    place = server.sockets[0].getsockname()
    where = f"receiving on {place[0]}:{place[1]}, storing below {plain(str(into))}"
    console(stderr=True).print(where, soft_wrap=True)
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with server:
        await ended.wait()


def _peer(writer: asyncio.StreamWriter) -> str:
    name = writer.get_extra_info("peername")
    return str(name[0]) if name else "unknown"


async def _serve_one(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    receiving: Receiving,
    parsing: asyncio.Lock,
) -> None:
    whole = False
    try:
        while await _take_one(reader, receiving, parsing):
            pass
        await asyncio.to_thread(receiving.end)
        whole = True
    except (Refused, BadFrame, OSError, EOFError, TimeoutError, asyncio.LimitOverrunError) as error:
        text = plain(str(error) or type(error).__name__)
        told = f"{receiving.peer}: {text}; connection reset, the sender tries again"
        console(stderr=True).print(told, soft_wrap=True)
    finally:
        await asyncio.shield(asyncio.to_thread(receiving.give_up))
        _close(writer, whole)


def _close(writer: asyncio.StreamWriter, whole: bool) -> None:
    """End a connection in order, or so that the sender knows that not all was taken."""
    if whole:
        writer.close()
        return
    connection = writer.get_extra_info("socket")
    with suppress(OSError, AttributeError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


async def _take_one(
    reader: asyncio.StreamReader, receiving: Receiving, parsing: asyncio.Lock
) -> bool:
    """Take one line or frame; return whether there was one."""
    try:
        first = await asyncio.wait_for(reader.read(1), _PAUSE)
    except TimeoutError:
        await asyncio.to_thread(receiving.store_small)
        first = await asyncio.wait_for(reader.read(1), _SILENCE)
    if not first:
        return False
    if first == frames.MAGIC[:1]:
        head = first + await reader.readexactly(frames.HEAD.size - 1)
        text, body = frames.lengths(head)
        told = await reader.readexactly(text)
        frame = frames.read(told, await reader.readexactly(body))
        await asyncio.to_thread(receiving.frame, frame)
        return True
    line = first + await reader.readuntil(b"\n")
    async with parsing:
        await asyncio.to_thread(receiving.line, line)
    return True


def _tell(path: Path) -> None:
    console().print(plain(os.fspath(path)), soft_wrap=True)
