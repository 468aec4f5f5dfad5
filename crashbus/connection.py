"""Speaking on the bus: streams are there, and what is published is stored.

Whatever goes wrong with the server or the way to it is `BusUnreachable` or `BusFull`, and a
message it will never take is `MessageTooLarge`; the connection itself is kept up for ever.
"""

import asyncio
import logging
from contextlib import suppress

import nats.errors
import nats.js.errors
from nats.js import JetStreamContext

from crashbus import streams
from crashbus.bus_errors import as_bus_errors
from crashbus.client import Client
from crashbus.errors import MessageTooLarge
from crashbus.message_base import Message

log = logging.getLogger("crashbus.bus")

PUBLISH_TIMEOUT = 5.0  # seconds for the server to store a message; its disk may be busy
CLOSE_TIMEOUT = 2.0  # seconds to say goodbye; a service stops within 10
DEFAULT_CHUNK_STORE = 8 * 1024**3


class Connection:
    """A connection to the bus that can publish; `Bus` is all of it."""

    def __init__(self, client: Client, host: str) -> None:
        self._client = client
        self._js: JetStreamContext = client.jetstream(timeout=PUBLISH_TIMEOUT)
        self._host = host
        # Room for chunks and replicas, set where this connection makes streams.
        self._streams: tuple[int, int] | None = None
        self._refused_until = 0.0  # monotonic seconds; until then no removal is tried
        self.malformed = 0  # messages skipped or put aside since the start

    @property
    def max_payload(self) -> int:
        """The server's limit for one message with its headers, in bytes."""
        return self._client.max_payload

    @property
    def is_connected(self) -> bool:
        """Whether the server can be reached just now."""
        return self._client.is_listening

    @property
    def is_encrypted(self) -> bool:
        """Whether nothing can be read or changed on the way to the server."""
        return self._client.is_encrypted

    @property
    def certificate_end(self) -> float | None:
        """Unix time at which the server's certificate ends; None: it showed none."""
        return self._client.certificate_end

    async def reconnect(self) -> None:
        """Connect anew; what is under way fails as when the server is lost."""
        await self._client.force_reconnect()

    async def ensure_streams(
        self, chunk_store_bytes: int = DEFAULT_CHUNK_STORE, replicas: int = 1
    ) -> bool:
        """Make the streams that do not exist, and tell whether there were such.

        One that exists stays as its owner made it. From then on this connection makes them anew
        should the server lose them.

        Args:
            chunk_store_bytes: room for chunks, see `crashbus.streams.all_streams`.
            replicas: servers of a JetStream cluster that each keep all of it.

        Raises:
            BusUnreachable: the bus does not answer, or does not let us.
            BusFull: it has no room for a stream.
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

        Args:
            headers: NATS's, by name; they count into `max_payload`.
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

    async def close(self) -> None:
        """Send what is still buffered, then close; takes some seconds where nobody answers."""
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
