"""The bus: NATS JetStream, spoken in messages instead of bytes.

``subscribe`` and ``stored`` are for anyone who listens; ``consume`` shares work among
services.
"""

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import TypeVar

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from crashbus import names, removing, streams
from crashbus.bus_errors import NotStored, as_bus_errors
from crashbus.chunks import Chunk
from crashbus.connection import Connection
from crashbus.consuming import Consumer, Delivery
from crashbus.errors import (
    BusFull,
    BusUnreachable,
    ChunksMissing,
    DamagedFile,
    MalformedMessage,
    MessageTooLarge,
    NoStreams,
    NotPermitted,
)
from crashbus.message_base import Message
from crashbus.messages import DeadLetter
from crashbus.reading import StreamReader, follow
from crashbus.subjects import chunk_subject

log = logging.getLogger("crashbus.bus")

REFUSED_FOR = 10.0  # seconds; a removal that is refused takes half of that, for nobody answers

M = TypeVar("M", bound=Message)


class Bus(Connection):
    """A connection to the bus; made by `connect`."""

    async def publish_chunk(self, crash_id: str, file: str, chunk: Chunk) -> None:
        """Publish one chunk of a crash file and wait until it is stored; raises as `publish`.

        Args:
            file: the crash file's name.
        """
        await self.publish_raw(chunk_subject(crash_id, file), chunk.body, chunk.headers())

    async def chunks(self, crash_id: str, file: str, count: int) -> AsyncIterator[Chunk]:
        """Yield the stored chunks 0 to `count` - 1 of a crash file, each checked.

        Chunks that are not due are passed over. Each is asked for by itself, so no
        more than one is held however slow the caller is.

        Args:
            count: as `CrashFile.chunks` tells.

        Raises:
            ChunksMissing: a chunk is not there.
            DamagedFile: a chunk is not what was sent, and no other copy of it is.
            NotPermitted: the server does not let us read it.
            BusUnreachable: the bus does not answer.
        """
        stream, subject = streams.chunks_of(file), chunk_subject(crash_id, file)
        sequence, index = 0, 0
        damaged: DamagedFile | None = None
        while index < count:
            try:
                with self._refusals_told(f"read {subject}"), as_bus_errors():
                    raw = await self._js.get_msg(
                        stream, seq=sequence + 1, subject=subject, direct=True, next=True
                    )
            except NotStored:
                missing = ChunksMissing(f"chunk {index} of {count} is not on the bus")
                raise damaged or missing from None
            assert raw.seq is not None
            sequence = raw.seq
            try:
                chunk = Chunk.received(raw.headers, raw.data or b"")
            except DamagedFile as error:
                damaged = damaged or error
                continue
            # A sender that lost the bus sends again from the chunk it is not sure of, so
            # copies and chunks ahead of their turn come before the one that is due.
            if chunk.index != index:
                continue
            yield chunk
            index, damaged = index + 1, None

    async def chunk_store_bytes(self, file: str) -> int:
        """Return how many bytes of chunks of such a file the bus can hold at all.

        Args:
            file: a crash file's name, which tells whether it is a large one.

        Raises:
            BusUnreachable: the bus does not answer, or has no streams.
        """
        with as_bus_errors():
            info = await self._js.stream_info(streams.chunks_of(file))
        limit = info.config.max_bytes or -1
        return limit if limit > 0 else 1 << 62

    async def chunk_count(self, crash_id: str, file: str) -> int:
        """Return how many chunks of a crash file the bus holds, copies included.

        Raises:
            BusUnreachable: the bus does not answer.
        """
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

        Raises:
            BusUnreachable: the bus does not answer.
        """
        found: set[str] = set()
        for stream, subject, token in streams.all_on_the_way(host):
            with suppress(NoStreams), as_bus_errors():
                info = await self._js.stream_info(stream, subjects_filter=subject)
                found.update(one.split(".")[token] for one in info.state.subjects or {})
        return found

    async def holds(self, kind: type[Message], subject: str) -> bool:
        """Tell whether the bus holds a message of this kind on exactly this subject.

        Raises:
            BusUnreachable: the bus does not answer.
        """
        try:
            with as_bus_errors():
                await self._js.get_last_msg(streams.stream_of(kind), subject)
        except (NotStored, NoStreams):
            return False
        return True

    async def purge_chunks(self, crash_id: str, file: str) -> None:
        """Remove all chunks of a crash file from the bus.

        Raises:
            NotPermitted: there are some, and the server does not let us.
            BusUnreachable: the bus does not answer.
        """
        await self._remove(streams.chunks_of(file), chunk_subject(crash_id, file))

    async def purge_crash(self, crash_id: str) -> None:
        """Remove all chunks and work items of a crash from the bus; raises as `purge_chunks`."""
        for stream, subject in streams.on_the_way(crash_id):
            await self._remove(stream, subject)

    async def _remove(self, stream: str, subject: str) -> None:
        if time.monotonic() < self._refused_until:
            with suppress(NoStreams), as_bus_errors():
                there = await self._js.stream_info(stream, subjects_filter=subject)
                if there.state.subjects:
                    raise NotPermitted(f"the bus does not let us remove {subject}")
            return
        server = self._client.connected_server_version
        try:
            with self._refusals_told(f"remove {subject}"), suppress(NoStreams), as_bus_errors():
                await removing.remove(self._js, server, stream, subject)
        except NotPermitted:
            self._refused_until = time.monotonic() + REFUSED_FOR
            raise

    @contextmanager
    def _refusals_told(self, what: str) -> Iterator[None]:
        """Context in which a request that is not answered, for it is refused, is `NotPermitted`."""
        refusals = self._client.refusals
        try:
            yield
        except BusUnreachable as error:
            if self._client.refusals == refusals:
                raise
            raise NotPermitted(f"the bus does not let us {what}") from error

    async def subscribe(self, kind: type[M], subject: str | None = None) -> AsyncGenerator[M, None]:
        """Yield messages from now on, in order, each once; over reconnects and restarts, too.

        Malformed messages are logged, counted and skipped.

        Args:
            subject: with wildcards, to hear of some only; None: all of this kind.

        Raises:
            BusUnreachable: the bus does not answer at the beginning, or has no streams.
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
        """Return the messages the bus holds now, as `each_stored` yields them."""
        async with aclosing(self.each_stored(kind, subject, since)) as messages:
            return [message async for message in messages]

    async def each_stored(
        self, kind: type[M], subject: str | None = None, since: float | None = None
    ) -> AsyncGenerator[M, None]:
        """Yield the messages the bus holds now, oldest first; malformed ones are left out.

        Args:
            subject: with wildcards, to have some only; None: all of this kind.
            since: leave out what the bus stored before this Unix time.

        Raises:
            BusUnreachable: the bus does not answer, or has no streams.
        """
        with as_bus_errors():
            last = (await self._js.stream_info(streams.stream_of(kind))).state.last_seq
            reader = StreamReader(self._js, streams.stream_of(kind), subject or kind.SUBJECT)
            async for raw in reader.until(last, since):
                message = self._read(kind, raw.subject or "", raw.data or b"")
                if message is not None:
                    yield message

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
    ) -> AsyncGenerator[Delivery[M], None]:
        """Yield work from a durable consumer that any number of services may share.

        Goes on for ever: over reconnects, and when streams had to be made anew. A malformed
        message is put aside as a dead letter, whole, and does not come again.

        Args:
            durable: the consumer's name, built of subject tokens and ``-``; those who use the
                same one share its messages.
            service: who is asking, for the dead letter.
            subject: with wildcards, to take some only; None: all of this kind.
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
