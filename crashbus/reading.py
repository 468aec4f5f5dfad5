"""Reading a stream by its sequence numbers.

Who may make a JetStream consumer may also change those of others, take their messages, and have
the server publish to any subject. Asking for one stored message after the other needs no more
than the right to ask, so that is how those who only listen read.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg, StreamInfo

from crashbus.cancellation import obeying_cancellation
from crashbus.client import Client

log = logging.getLogger("crashbus.bus")

MOST_AT_ONCE = 32  # requests under way; an answer is at most as large as the server's max_payload
LOOK_FIRST = 0.01  # seconds: a message is announced a little before it is stored
LOOK_LAST = 5.0  # seconds between looks when nothing was announced
TRY_AGAIN = 0.5  # seconds after a failure


class StreamReader:
    """Yields what a stream holds on a subject, in its order, each message once.

    Args:
        subject: may have wildcards.
    """

    def __init__(self, js: JetStreamContext, stream: str, subject: str) -> None:
        self._js = js
        self._stream = stream
        self._subject = subject
        self._at_once = 1

    async def until(self, last: int, since: float | None = None) -> AsyncIterator[RawStreamMsg]:
        """Yield what is stored up to a sequence number, from a Unix time on if one is given."""
        seen = await self._before(since, last) if since is not None else 0
        while seen < last and (found := await self.after(seen)):
            for raw in found:
                assert raw.seq is not None
                seen = raw.seq
                if seen <= last:
                    yield raw

    async def after(self, sequence: int) -> list[RawStreamMsg]:
        """Return the next messages, some; empty if there is none yet.

        Of neighbouring numbers several are asked for at once: as many more as messages lie
        close together.
        """
        asked = [self._next(sequence + 1 + ahead) for ahead in range(self._at_once)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found: dict[int, RawStreamMsg] = {}
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            if answer is not None and answer.seq is not None:
                found[answer.seq] = answer
        self._at_once = min(MOST_AT_ONCE, 2 * len(found)) or 1
        return [found[number] for number in sorted(found)]

    async def _next(self, sequence: int) -> RawStreamMsg | None:
        try:
            return await self._js.get_msg(
                self._stream, seq=sequence, subject=self._subject, next=True
            )
        except nats.js.errors.NotFoundError:
            return None

    async def _before(self, moment: float, last: int) -> int:
        """Return a sequence number behind which lies all that was stored since a Unix time."""
        low, high = 0, last
        while low < high:
            middle = (low + high) // 2
            raw = await self._next(middle + 1)
            if raw is None or raw.time is None or raw.time.timestamp() >= moment:
                high = middle
            else:
                assert raw.seq is not None
                low = min(raw.seq, last)
        return low


async def follow(
    client: Client, js: JetStreamContext, start: StreamInfo, subject: str
) -> AsyncGenerator[RawStreamMsg, None]:
    """Yield messages from now on, over reconnects and over the loss of the stream.

    Args:
        start: the stream as it was; what it held then is left out.
    """
    assert start.config.name is not None
    stream, made, seen = start.config.name, start.created, start.state.last_seq
    announced = asyncio.Event()

    async def announce(_: Msg) -> None:
        announced.set()

    # What is heard is only a reason to look: it may be lost, and comes before it is stored.
    bell = await client.subscribe(subject, cb=announce)
    reader, pause, sure, troubled = StreamReader(js, stream, subject), LOOK_FIRST, -1, False
    try:
        while True:
            try:
                with obeying_cancellation():
                    if sure != client.stats["reconnects"]:
                        sure = client.stats["reconnects"]
                        now = await js.stream_info(stream)
                        if now.created != made:  # made anew: all in it came since
                            made, seen = now.created, 0
                    found = await reader.after(seen)
            except (nats.errors.Error, OSError) as error:
                if not troubled:
                    log.warning("cannot follow %s, trying again: %s", stream, error)
                sure, troubled = -1, True
                await asyncio.sleep(TRY_AGAIN)
                continue
            troubled = False
            for raw in found:
                assert raw.seq is not None
                seen = raw.seq
                yield raw
            if found or await _heard(announced, pause):
                pause = LOOK_FIRST
            else:
                pause = min(2 * pause, LOOK_LAST)
                sure = sure if pause < LOOK_LAST else -1
    finally:
        await _let_go(bell)


async def _heard(announced: asyncio.Event, within: float) -> bool:
    """Wait for an announcement; tell whether there was one."""
    waiting = asyncio.ensure_future(announced.wait())
    try:
        # Not wait_for: before Python 3.12 it may swallow a cancellation.
        done, _ = await asyncio.wait({waiting}, timeout=within)
    finally:
        waiting.cancel()
    announced.clear()
    return bool(done)


async def _let_go(bell: Any) -> None:
    try:
        await bell.unsubscribe()
    except (nats.errors.Error, OSError):
        log.debug("the connection was gone before the subscription")
