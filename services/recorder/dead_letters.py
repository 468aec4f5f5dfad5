"""Dead letters of crashes that could not be captured: told on the bus whenever it is there.

Capture does not wait for the bus. What cannot be told now waits in memory, within a bound;
the log has it in any case.
"""

import asyncio
from collections import deque

import structlog

from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable
from crashbus.messages import DeadLetter
from services.common.service import Runtime
from services.recorder import metrics
from services.recorder.errors import CaptureFailed

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_KEPT = 1024  # letters; more failures than this while the bus is away tell nothing new
_AGAIN = 2.0  # seconds until a letter that the bus did not take is offered again


class DeadLetters:
    """Takes letters from any thread and publishes them.

    Made on the event loop that `run` runs on.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[DeadLetter] = deque()
        self._some = asyncio.Event()
        self._all_told = asyncio.Event()
        self._all_told.set()

    def add(self, failure: CaptureFailed) -> None:
        """Log a failure and have it told; callable from any thread."""
        log.error(
            "a crash was not captured",
            crash_id=failure.crash_id,
            reason=failure.reason,
            error=str(failure),
            mend=failure.mend,
        )
        letter = DeadLetter(
            host=self._runtime.host,
            crash_id=failure.crash_id,
            service="recorder",
            reason=failure.reason,
            error=str(failure),
            mend=failure.mend,
        )
        self._loop.call_soon_threadsafe(self._append, letter)

    def _append(self, letter: DeadLetter) -> None:
        if len(self._waiting) >= _KEPT:
            metrics.DEAD_LETTERS.labels("dropped").inc()
            return
        self._waiting.append(letter)
        self._all_told.clear()
        self._some.set()

    async def run(self) -> None:
        """Connect as soon as the bus is there, and publish for ever."""
        try:
            async with self._runtime.bus(needed=False) as bus:
                while True:
                    await self._some.wait()
                    await self._publish_waiting(bus)
        except Exception as error:
            log.error("dead letters are no longer told", exc_info=error)
            self._runtime.health.failing("dead_letters", str(error))

    async def all_told(self) -> None:
        """Wait until none is left."""
        await self._all_told.wait()

    async def _publish_waiting(self, bus: Bus) -> None:
        while self._waiting:
            try:
                await bus.publish(self._waiting[0])
            except (BusUnreachable, BusFull) as error:
                log.warning("a dead letter waits for the bus", error=str(error))
                await asyncio.sleep(_AGAIN)
                continue
            self._waiting.popleft()
            metrics.DEAD_LETTERS.labels("published").inc()
        self._some.clear()
        self._all_told.set()
