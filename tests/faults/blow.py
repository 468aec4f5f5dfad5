"""A fault as it is done: it waits for something that it can hit, and counts what it has hit.

A service that is killed while it has nothing to do proves nothing.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from signal import SIGCONT, SIGSTOP

from tests.faults.rig import PATIENCE, Rig
from tests.support.service import ServiceProcess

Count = Callable[[], float | Awaitable[float]]

LULL = 0.5  # seconds without anything to hit after which one more crash comes
WANDER = 0.3  # seconds, at most, from the sight of something to the blow
LOOK_EVERY = 0.02  # seconds


@dataclass
class Blow:
    """One fault, done to a rig.

    Attributes:
        another: lets one more crash come, where none is to come anyway.
        hits: what was hit, and how often.
        may_be_lost: PIDs of the crashes that the fault may cut short or keep from being captured.
    """

    rig: Rig
    random: Random
    another: Callable[[], Awaitable[None]]
    hits: Counter[str] = field(default_factory=Counter)
    may_be_lost: set[int] = field(default_factory=set)

    async def reach(self, what: str, count: Count) -> None:
        """Return at a random moment at which a number is not 0, and note it."""
        while True:
            await self._above_zero(what, count)
            await asyncio.sleep(self.random.uniform(0, WANDER))
            if number := await _value(count):
                self.hits[what] += int(number)
                return

    async def catch(
        self, services: list[ServiceProcess], what: str, count: Count, wander: float = WANDER
    ) -> None:
        """Stop services at a random moment at which a number is not 0, and note it.

        It is looked at once they stand still, so it is so when they are killed after that.
        """

        async def caught() -> float:
            if not await _value(count):
                return 0
            await asyncio.sleep(self.random.uniform(0, wander))
            for service in services:
                service.kill(SIGSTOP)
            number = await _value(count)
            if not number:
                for service in services:
                    service.kill(SIGCONT)
            return number

        await self.until(what, caught)

    async def pause(self) -> None:
        """Let a little time pass between two looks."""
        await asyncio.sleep(LOOK_EVERY)

    async def until(self, what: str, count: Count) -> None:
        """Return once a number is not 0, and note it."""
        self.hits[what] += int(await self._above_zero(what, count))

    @asynccontextmanager
    async def counting(self, what: str, least: int = 1) -> AsyncIterator[None]:
        """Note how often the ways to the servers did something; end when it is enough."""
        before = self.rig.done_by_ways()[what]
        yield
        await self._above_zero(what, lambda: self.rig.done_by_ways()[what] - before >= least)
        self.hits[what] += self.rig.done_by_ways()[what] - before

    @asynccontextmanager
    async def failing(self) -> AsyncIterator[None]:
        """Note for what reasons deliveries fail meanwhile; end when one did."""
        before = await self.rig.failures()
        yield

        async def failed() -> int:
            return (await self.rig.failures() - before).total()

        await self._above_zero("failed delivery", failed)
        self.hits += await self.rig.failures() - before

    async def _above_zero(self, what: str, count: Count) -> float:
        end, next_crash = time.monotonic() + PATIENCE, time.monotonic() + LULL
        while not (number := await _value(count)):
            now = time.monotonic()
            if now > end:
                raise AssertionError(f"the fault hit nothing: no {what} in {PATIENCE:g} s")
            if now > next_crash:
                await self.another()
                next_crash = time.monotonic() + LULL
            await asyncio.sleep(LOOK_EVERY)
        return number


async def _value(count: Count) -> float:
    found = count()
    return await found if isinstance(found, Awaitable) else found
