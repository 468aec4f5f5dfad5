"""What lies in the work queue, seen without taking it from whoever it is for.

A work-queue stream has no second reader: messages are fetched by their sequence here.
"""

from dataclasses import dataclass
from datetime import datetime

from nats.js.api import ConsumerInfo

from crashbus import streams
from crashbus.bus import Bus
from crashbus.bus_errors import NotStored, as_bus_errors
from crashbus.errors import NoStreams

SERVED_WITHIN = 24 * 60 * 60.0  # seconds without a sign of life after which a consumer is a relic


@dataclass(frozen=True)
class QueuedMessage:
    """A message as it lies in the work queue.

    Attributes:
        stored: when the bus took it, in Unix seconds by the server's clock.
    """

    sequence: int
    subject: str
    payload: bytes
    stored: float


@dataclass(frozen=True)
class QueueConsumer:
    """A durable consumer of the work queue.

    Attributes:
        asking: somebody asks it for a message just now.
        active: when it was made or gave out its last message, in Unix seconds.
        items: how many messages wait for it or are in the hands of who uses it.
    """

    filter: str
    asking: bool
    active: float
    items: int = 0

    def serves(self, subject: str, now: float) -> bool:
        """Tell whether messages on a subject are for it, and somebody uses it.

        A durable consumer outlives its shippers; one that nobody has used for a day stands for
        a destination that is configured nowhere any more.
        """
        in_use = self.asking or now - self.active < SERVED_WITHIN
        return in_use and _matches(subject.split("."), self.filter.split("."))


def _matches(subject: list[str], pattern: list[str]) -> bool:
    if pattern[-1] == ">":
        pattern = pattern[:-1]
        if len(subject) <= len(pattern):
            return False
        subject = subject[: len(pattern)]
    return len(subject) == len(pattern) and all(
        wanted in ("*", token) for wanted, token in zip(pattern, subject, strict=True)
    )


class WorkQueue:
    """The stream of work items.

    All of it raises `BusUnreachable` where the bus does not answer.
    """

    def __init__(self, bus: Bus) -> None:
        self._js = bus._js

    async def consumers(self) -> list[QueueConsumer]:
        """Return all consumers there are."""
        found: list[QueueConsumer] = []
        with as_bus_errors():
            while page := await self._js.consumers_info(streams.FILES, offset=len(found)):
                found += [_consumer(info) for info in page]
        return found

    async def after(self, sequence: int) -> QueuedMessage | None:
        """Return the first message behind a sequence number (0: of all); None if there is none."""
        try:
            with as_bus_errors():
                raw = await self._js.get_msg(
                    streams.FILES, seq=sequence + 1, subject="crash.file.>", next=True
                )
        except (NotStored, NoStreams):
            return None
        assert raw.seq is not None
        assert raw.time is not None
        return QueuedMessage(raw.seq, raw.subject or "", raw.data or b"", _unix(raw.time))

    async def remove(self, sequence: int) -> None:
        """Remove a message for good; one that is gone already is no error."""
        try:
            with as_bus_errors():
                await self._js.delete_msg(streams.FILES, sequence)
        except (NotStored, NoStreams):
            return

    async def retire(self, durable: str) -> None:
        """Remove a consumer; its messages stay. One that is gone already is no error."""
        try:
            with as_bus_errors():
                await self._js.delete_consumer(streams.FILES, durable)
        except (NotStored, NoStreams):
            return


def _consumer(info: ConsumerInfo) -> QueueConsumer:
    last = info.delivered.last_active if info.delivered else None
    # Without a filter it takes everything.
    pattern = info.config.filter_subject or ">"
    items = (info.num_pending or 0) + (info.num_ack_pending or 0)
    return QueueConsumer(pattern, bool(info.num_waiting), _unix(last or info.created), items)


def _unix(moment: datetime) -> float:
    return moment.timestamp()
