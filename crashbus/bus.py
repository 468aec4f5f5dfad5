"""The bus: NATS JetStream, spoken in messages instead of bytes.

``subscribe`` and ``stored`` are for anyone who listens; ``consume`` shares work among
services. Whatever goes wrong with the server or the way to it is `BusUnreachable` or
`BusFull`, and a message it will never take is `MessageTooLarge`; the connection itself is
kept up for ever.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

import nats
import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from crashbus import names, removing, streams
from crashbus.bus_errors import NotStored, as_bus_errors
from crashbus.chunks import Chunk
from crashbus.client import Client
from crashbus.consuming import Consumer, Delivery
from crashbus.errors import (
    BusFull,
    BusUnreachable,
    ChunksMissing,
    MalformedMessage,
    MessageTooLarge,
    NoStreams,
)
from crashbus.messages import DeadLetter, Message, chunk_subject
from crashbus.reading import StreamReader, follow

log = logging.getLogger("crashbus.bus")

__all__ = ["Bus", "Delivery", "connect", "without_secrets"]

M = TypeVar("M", bound=Message)

CONNECT_TIMEOUT = 2.0  # seconds for one try; a server on the next host answers in milliseconds
RECONNECT_WAIT = 0.5  # seconds between tries: short, so that little piles up meanwhile
PUBLISH_TIMEOUT = 5.0  # seconds for the server to store a message; its disk may be busy
CLOSE_TIMEOUT = 2.0  # seconds to say goodbye; a service stops within 10
MOST_REFUSALS = 100  # told for one connection
DEFAULT_CHUNK_STORE = 8 * 1024**3


class Bus:
    """A connection to the bus; made by `connect`."""

    def __init__(self, client: Client, host: str) -> None:
        self._client = client
        self._js: JetStreamContext = client.jetstream(timeout=PUBLISH_TIMEOUT)
        self._host = host
        # Room for chunks and replicas, set where this connection makes streams.
        self._streams: tuple[int, int] | None = None
        self.malformed = 0  # messages skipped or put aside since the start

    @property
    def max_payload(self) -> int:
        """The server's limit for one message with its headers, in bytes."""
        return self._client.max_payload

    @property
    def is_connected(self) -> bool:
        """Whether the server can be reached just now."""
        return self._client.is_listening

    async def ensure_streams(
        self, chunk_store_bytes: int = DEFAULT_CHUNK_STORE, replicas: int = 1
    ) -> bool:
        """Make the streams that do not exist, and tell whether there were such.

        One that exists stays as its owner made it. From then on this connection makes them anew
        should the server lose them.
        """
        self._streams, made = (chunk_store_bytes, replicas), False
        with as_bus_errors():
            for config in streams.all_streams(chunk_store_bytes, replicas):
                assert config.name is not None
                try:
                    await self._js.stream_info(config.name)
                except nats.js.errors.NotFoundError:
                    await self._js.add_stream(config)
                    made = True
        return made

    async def publish(self, message: Message) -> None:
        """Publish a message and wait until the server has stored it.

        Raises:
            BusUnreachable: it may or may not have been stored; publish it again.
            BusFull: it was refused for want of room.
            MessageTooLarge: it will never be stored.
        """
        key = message.message_id
        headers = {"Nats-Msg-Id": key} if key else None
        await self.publish_raw(message.subject, message.encode(), headers)

    async def publish_raw(
        self, subject: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> None:
        """Publish bytes that were encoded before, and wait until they are stored.

        Raises as `publish` does.
        """
        # The client looks at the payload alone; over its headers the server would hang up.
        size = len(payload) + _header_size(headers)
        if size > self.max_payload:
            raise MessageTooLarge(
                f"{size} bytes for {subject[:512]}, the server takes {self.max_payload}; "
                "raise its max_payload"
            )
        with as_bus_errors():
            try:
                await self._js.publish(subject, payload, headers=headers)
            except (nats.js.errors.NoStreamResponseError, nats.errors.TimeoutError):
                # A stream that is not there does not answer, and the server says so only where
                # nobody else listens.
                if not await self._restore_streams():
                    raise
                await self._js.publish(subject, payload, headers=headers)

    async def _restore_streams(self) -> bool:
        """Make streams that the server lost, if making them is our business; tell if any was."""
        if self._streams is None or not self.is_connected:
            return False
        made = await self.ensure_streams(*self._streams)
        if made:
            log.warning("the bus had lost streams, they were made anew")
        return made

    async def publish_chunk(self, crash_id: str, file: str, chunk: Chunk) -> None:
        """Publish one chunk of a crash file and wait until it is stored."""
        await self.publish_raw(chunk_subject(crash_id, file), chunk.body, chunk.headers())

    async def chunks(self, crash_id: str, file: str, count: int) -> AsyncIterator[Chunk]:
        """Yield the stored chunks 0 to `count` - 1 of a crash file, each checked.

        Chunks that are not due are passed over. Each is asked for by itself, so no
        more than one is held however slow the caller is.

        Raises:
            ChunksMissing: a chunk is not there.
            DamagedFile: a chunk is not what was sent.
        """
        stream, subject = streams.chunks_of(file), chunk_subject(crash_id, file)
        sequence, index = 0, 0
        while index < count:
            try:
                with as_bus_errors():
                    raw = await self._js.get_msg(
                        stream, seq=sequence + 1, subject=subject, direct=True, next=True
                    )
            except NotStored:
                raise ChunksMissing(f"chunk {index} of {count} is not on the bus") from None
            assert raw.seq is not None
            sequence = raw.seq
            chunk = Chunk.received(raw.headers, raw.data or b"")
            # A sender that lost the bus sends again from the chunk it is not sure of, so
            # copies and chunks ahead of their turn come before the one that is due.
            if chunk.index != index:
                continue
            yield chunk
            index += 1

    async def chunk_store_bytes(self, file: str) -> int:
        """Return how many bytes of chunks of such a file the bus can hold at all."""
        with as_bus_errors():
            info = await self._js.stream_info(streams.chunks_of(file))
        limit = info.config.max_bytes or -1
        return limit if limit > 0 else 1 << 62

    async def chunk_count(self, crash_id: str, file: str) -> int:
        """Return how many chunks of a crash file the bus holds, copies included."""
        subject = chunk_subject(crash_id, file)
        try:
            with as_bus_errors():
                info = await self._js.stream_info(streams.chunks_of(file), subjects_filter=subject)
        except NoStreams:
            return 0
        return (info.state.subjects or {}).get(subject, 0)

    async def crashes_on_the_way(self, host: str) -> set[str]:
        """Return the IDs of the crashes of which the bus holds a host's items, or any chunks.

        Chunks do not tell which host they are of.
        """
        found: set[str] = set()
        for stream, subject, token in streams.all_on_the_way(host):
            with suppress(NoStreams), as_bus_errors():
                info = await self._js.stream_info(stream, subjects_filter=subject)
                found.update(one.split(".")[token] for one in info.state.subjects or {})
        return found

    async def holds(self, kind: type[Message], subject: str) -> bool:
        """Tell whether the bus holds a message of this kind on exactly this subject."""
        try:
            with as_bus_errors():
                await self._js.get_last_msg(streams.stream_of(kind), subject)
        except (NotStored, NoStreams):
            return False
        return True

    async def purge_chunks(self, crash_id: str, file: str) -> None:
        """Remove all chunks of a crash file from the bus."""
        await self._remove(streams.chunks_of(file), chunk_subject(crash_id, file))

    async def purge_crash(self, crash_id: str) -> None:
        """Remove all chunks and work items of a crash from the bus."""
        for stream, subject in streams.on_the_way(crash_id):
            await self._remove(stream, subject)

    async def _remove(self, stream: str, subject: str) -> None:
        server = self._client.connected_server_version
        with suppress(NoStreams), as_bus_errors():
            await removing.remove(self._js, server, stream, subject)

    async def subscribe(self, kind: type[M], subject: str | None = None) -> AsyncIterator[M]:
        """Yield messages from now on, in order, each once; over reconnects and restarts, too.

        Malformed messages are logged, counted and skipped.
        """
        with as_bus_errors():
            stream = await self._js.stream_info(streams.stream_of(kind))
        following = follow(self._client, self._js, stream, subject or kind.SUBJECT)
        async with aclosing(following) as messages:
            async for raw in messages:
                message = self._read(kind, raw.subject or "", raw.data or b"")
                if message is not None:
                    yield message

    async def stored(
        self, kind: type[M], subject: str | None = None, since: float | None = None
    ) -> list[M]:
        """Return the messages the bus holds now, oldest first; malformed ones are left out.

        Args:
            since: leave out what the bus stored before this Unix time.

        Raises:
            BusUnreachable: the bus does not answer.
        """
        stream, messages = streams.stream_of(kind), []
        with as_bus_errors():
            last = (await self._js.stream_info(stream)).state.last_seq
            reader = StreamReader(self._js, stream, subject or kind.SUBJECT)
            async for raw in reader.until(last, since):
                message = self._read(kind, raw.subject or "", raw.data or b"")
                if message is not None:
                    messages.append(message)
        return messages

    def _metadata(self, raw: Msg) -> Msg.Metadata | None:
        """Return a message's place in its stream; None if someone sent it past the stream."""
        try:
            return raw.metadata
        except (nats.errors.NotJSMessageError, ValueError, OverflowError, OSError):
            self.malformed += 1
            subject = names.printable(raw.subject[:200])
            log.warning("dropped a message on %s that is from no stream", subject)
            return None

    def _read(self, kind: type[M], subject: str, payload: bytes) -> M | None:
        try:
            return kind.decode(payload, subject)
        except MalformedMessage as error:
            self.malformed += 1
            log.warning("%s", error)
            return None

    async def consume(
        self,
        kind: type[M],
        durable: str,
        *,
        service: str,
        subject: str | None = None,
        ack_wait: float = 30,
        batch: int = 1,
        new_only: bool = False,
        max_ack_pending: int = 1024,
    ) -> AsyncIterator[Delivery[M]]:
        """Yield work from a durable consumer that any number of services may share.

        Goes on for ever: over reconnects, and when streams had to be made anew. A malformed
        message is put aside as a dead letter, whole, and does not come again.

        Args:
            durable: the consumer's name, built of subject tokens and ``-``; those who use the
                same one share its messages.
            service: who is asking, for the dead letter.
            ack_wait: seconds after which an unsettled message is given to another.
            batch: how many to ask for at once.
            new_only: when the consumer is made, leave out what was there before it.
            max_ack_pending: when the consumer is made, how many of its messages may be
                unsettled at once, with all who share them.
        """
        consumer = Consumer(
            self._js,
            streams.stream_of(kind),
            subject or kind.SUBJECT,
            durable,
            ConsumerConfig(
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=ack_wait,
                max_deliver=-1,
                max_ack_pending=max_ack_pending,
                deliver_policy=DeliverPolicy.NEW if new_only else DeliverPolicy.ALL,
            ),
            self._restore_streams,
        )
        try:
            while True:
                for raw in await consumer.next(batch):
                    delivery = await self._taken(kind, raw, service)
                    if delivery is not None:
                        yield delivery
        finally:
            await consumer.close()

    async def _taken(self, kind: type[M], raw: Msg, service: str) -> Delivery[M] | None:
        metadata = self._metadata(raw)
        if metadata is None:
            return None
        try:
            message = kind.decode(raw.data, raw.subject)
        except MalformedMessage as malformed:
            await self._put_aside(raw, malformed, service)
            return None
        return Delivery(message, metadata.num_delivered or 1, raw)

    async def _put_aside(self, raw: Msg, error: MalformedMessage, service: str) -> None:
        """Keep a malformed message for inspection; while that fails, it stays where it is."""
        self.malformed += 1
        log.error("%s; kept on %s", error, DeadLetter.SUBJECT)
        letter = DeadLetter(
            host=self._host,
            service=service,
            reason="malformed_message",
            error=str(error),
            mend="find out who published it; a newer major version needs newer services",
            subject_received=error.subject[:1024],
            payload_received=error.payload[: self.max_payload // 2],
        )
        try:
            await self.publish(letter)
            with as_bus_errors():
                await raw.term()
        except (BusUnreachable, BusFull, MessageTooLarge) as failure:
            log.warning("could not put it aside, it will come again: %s", failure)

    async def close(self) -> None:
        """Send what is still buffered, then close."""
        try:
            await asyncio.wait_for(self._client.flush(), PUBLISH_TIMEOUT)
        except (nats.errors.Error, TimeoutError, OSError):
            log.warning("the bus was not reachable at the end")
        # Without a bound it may wait for ever for TLS to end that never began: the server was
        # started anew and wants it now.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._client.close(), CLOSE_TIMEOUT)


def _header_size(headers: dict[str, str] | None) -> int:
    """Return the bytes that headers take on the wire: NATS/1.0, a line for each, an empty one."""
    if not headers:
        return 0
    return 12 + sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())


@asynccontextmanager
async def connect(
    url: str = "nats://127.0.0.1:4222", *, host: str = "consumer", **options: Any
) -> AsyncIterator[Bus]:
    """Connect to the bus.

    Args:
        url: one or more server addresses, separated by commas.
        host: the name that dead letters of this connection carry.
        options: further options of ``nats.connect``, such as ``nkeys_seed``,
            ``user_credentials`` or ``tls``.

    Raises:
        BusUnreachable: no server answers; later losses are mended silently.
    """

    closing = False
    shown = without_secrets(url)

    async def on_disconnect() -> None:
        if not closing:
            log.warning("lost the bus at %s, reconnecting", shown)

    async def on_reconnect() -> None:
        log.info("the bus at %s is back", shown)

    refused: set[str] = set()

    async def on_error(error: Exception) -> None:
        text = str(error)[:500]
        if "permissions violation" not in text or text in refused or len(refused) >= MOST_REFUSALS:
            log.debug("bus: %s", error)
            return
        refused.add(text)  # what is asked for again and again is told once
        log.warning("the bus does not let us: %s; see its account's permissions", text)

    settings: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT,
        "reconnect_time_wait": RECONNECT_WAIT,
        "max_reconnect_attempts": -1,
        "disconnected_cb": on_disconnect,
        "reconnected_cb": on_reconnect,
        "error_cb": on_error,
        **options,
    }
    client = Client()
    try:
        await _first_connection(client, url, settings)
    except (TimeoutError, nats.errors.Error, OSError) as error:
        cause = client.last_error or error  # each try's error is swallowed, the bound's is not
        reason = f"{type(cause).__name__} {cause}".strip()
        raise BusUnreachable(f"no NATS server answers at {shown} ({reason})") from error
    bus = Bus(client, host)
    try:
        yield bus
    finally:
        closing = True
        await bus.close()


def without_secrets(url: str) -> str:
    """Return server addresses as they may be shown: user, password and token left out."""
    return re.sub(r"//[^/,]*@", "//…@", url)


async def _first_connection(client: Client, url: str, settings: dict[str, Any]) -> None:
    """Connect once or fail: without a bound here, the client would try for ever in silence."""
    servers = [part.strip() for part in url.split(",")]
    await asyncio.wait_for(client.connect(servers, **settings), CONNECT_TIMEOUT * len(servers) + 1)
