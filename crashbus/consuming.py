"""Taking work from a durable consumer, whatever becomes of server, stream and consumer."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig

from crashbus.bus_errors import as_bus_errors
from crashbus.cancellation import obeying_cancellation
from crashbus.errors import BusFull, BusUnreachable
from crashbus.message_base import Message

log = logging.getLogger("crashbus.bus")

M = TypeVar("M", bound=Message)
Subscription = JetStreamContext.PullSubscription

FETCH_TIMEOUT = 5.0  # seconds one fetch waits before it asks again
TRY_AGAIN = 0.5  # seconds after a failure
ACK_TIMEOUT = 5.0  # seconds for the server to take note


@dataclass(frozen=True)
class Delivery(Generic[M]):
    """A message taken from a durable consumer; it comes again unless it is settled.

    Attributes:
        message: what was published.
        attempts: how often it has been delivered, this time included.
    """

    message: M
    attempts: int
    _raw: Msg

    @property
    def published(self) -> float:
        """When the bus took it, in Unix seconds by the server's clock."""
        return self._raw.metadata.timestamp.timestamp()

    async def ack(self) -> None:
        """It is done, and the server has heard so.

        Raises:
            BusUnreachable: it may not have, and the message may come again.
        """
        with as_bus_errors():
            await self._raw.ack_sync(timeout=ACK_TIMEOUT)

    async def retry(self, delay: float) -> None:
        """Hand it back, to be delivered again after `delay` seconds.

        Raises:
            BusUnreachable: it comes again after the acknowledgement wait.
        """
        with as_bus_errors():
            await self._raw.nak(delay=delay)

    async def working(self) -> None:
        """It is still being worked on: start the acknowledgement wait anew.

        Raises:
            BusUnreachable: the server has not heard so.
        """
        with as_bus_errors():
            await self._raw.in_progress()


class Consumer:
    """A durable consumer that is found, or made, again whenever it was lost.

    Args:
        durable: its name.
        restore_streams: makes streams that the server lost.
    """

    def __init__(
        self,
        js: JetStreamContext,
        stream: str,
        subject: str,
        durable: str,
        config: ConsumerConfig,
        restore_streams: Callable[[], Awaitable[bool]],
    ) -> None:
        self._js = js
        self._stream = stream
        self._subject = subject
        # nats-server makes a format string of the name, in which '%' ruins every message's
        # acknowledgement subject. No token holds '='.
        self._durable = durable.replace("%", "=")
        self._config = config
        self._restore_streams = restore_streams
        self._subscription: Subscription | None = None

    async def next(self, batch: int) -> list[Msg]:
        """Wait for messages and return them, at most `batch`."""
        while True:
            try:
                return await self._fetch(batch)
            except TimeoutError:  # NATS's own, or asyncio's where the first request got no answer
                self._subscription = await _if_there(self._subscription)
            except (nats.errors.Error, OSError) as error:
                log.warning("cannot take work from %s, trying again: %s", self._stream, error)
                await self.close()
                await asyncio.sleep(TRY_AGAIN)
                await self._restore_if_lost(error)

    async def _fetch(self, batch: int) -> list[Msg]:
        if self._subscription is None:
            with obeying_cancellation():
                self._subscription = await self._js.pull_subscribe(
                    self._subject, durable=self._durable, stream=self._stream, config=self._config
                )
        with obeying_cancellation():
            found: list[Msg] = await self._subscription.fetch(batch, timeout=FETCH_TIMEOUT)
        return found

    async def _restore_if_lost(self, error: Exception) -> None:
        if isinstance(error, nats.js.errors.NotFoundError):
            try:
                await self._restore_streams()
            except (BusUnreachable, BusFull) as failure:
                log.warning("could not make the streams: %s", failure)

    async def close(self) -> None:
        """Stop asking; the consumer stays for others."""
        subscription, self._subscription = self._subscription, None
        await _let_go(subscription)


async def _let_go(subscription: Subscription | None) -> None:
    """Let go of an inbox: a request still open there would swallow the next message."""
    if subscription is not None:
        with suppress(nats.errors.Error, OSError):
            await subscription.unsubscribe()


async def _if_there(subscription: Subscription | None) -> Subscription | None:
    """Return a subscription that was silent, or None where its consumer is gone.

    A server that lost a consumer does not say so: a fetch from it just times out.
    """
    if subscription is not None:
        try:
            with obeying_cancellation():
                await subscription.consumer_info()
        except (nats.errors.Error, OSError):
            return None
    return subscription
