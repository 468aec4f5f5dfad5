"""One scenario, once: crashes come, something is done to those who deliver them, all ends well."""

import asyncio
import os
from collections import Counter
from random import Random

from tests.faults.blow import Blow
from tests.faults.crashes import MIB, CrashSet, RealCrash, core_pieces, core_size, write_set
from tests.faults.rig import HOST, Rig
from tests.faults.scenarios import Scenario

CRASHES = int(os.environ.get("FAULT_CRASHES", "3"))  # of each scenario, at least
LEAST_NOISY = 8  # MiB
FAULT_EACH = 10  # crashes: with many of them, the fault comes several times


class Trial:
    """One scenario.

    Attributes:
        crashes: what has crashed.
        hits: what the fault has hit, and how often.
        may_be_lost: see `Blow`.
    """

    def __init__(self, rig: Rig, scenario: Scenario, random: Random) -> None:
        self._rig = rig
        self._scenario = scenario
        self._random = random
        self._more = Random(random.random())  # of its own, for both draw at the same time
        self._crashing: asyncio.Task[None] | None = None
        self.crashes: list[CrashSet | RealCrash] = []
        self.hits: Counter[str] = Counter()
        self.may_be_lost: set[int] = set()

    @property
    def _sets(self) -> list[CrashSet]:
        return [one for one in self.crashes if isinstance(one, CrashSet)]

    async def suffer(self) -> None:
        """Let crashes come, and the fault, and let it be over."""
        rounds = max(1, CRASHES // FAULT_EACH)
        for number in range(rounds):
            await self._round(CRASHES // rounds + (number < CRASHES % rounds))

    async def _round(self, count: int) -> None:
        rig, scenario, random = self._rig, self._scenario, self._random
        blow, before = Blow(rig, random, self._another), len(self._sets)
        if not scenario.first:
            self._crashing = asyncio.create_task(self._crash(count))
            await asyncio.sleep(random.uniform(0, 1))
        async with scenario.fault(blow):
            if scenario.first:
                await self._crash(count)
            await asyncio.sleep(random.uniform(*scenario.lasts))
            if scenario.replayed:
                await rig.ends.failed(self._sets[before:])
        await self._crashed()
        assert blow.hits, "the fault hit nothing"
        self.hits += blow.hits
        self.may_be_lost |= blow.may_be_lost

    async def _crash(self, count: int) -> None:
        for _ in range(count):
            await self._one()
            await asyncio.sleep(self._more.uniform(0, 0.3))

    async def _another(self) -> None:
        if self._crashing is None or self._crashing.done():
            await self._crashed()
            self._crashing = asyncio.create_task(self._crash(1))

    async def _crashed(self) -> None:
        if self._crashing is not None:
            await self._crashing

    async def _one(self) -> None:
        noisy, largest = self._scenario.noisy, self._rig.largest
        size = core_size(self._more, min(LEAST_NOISY, largest) if noisy else 1, largest)
        if self._rig.capture:
            self.crashes.append(await self._rig.crash(size // MIB))
            return
        core = core_pieces(size, self._more, noisy=noisy)
        made = await asyncio.to_thread(write_set, self._rig.spool, HOST, core, self._more)
        self.crashes.append(made)

    async def end(self) -> str:
        """Return how it ended for the crashes, once that is as it must be."""
        ends = self._rig.ends
        if not self._rig.capture:
            if self._scenario.replayed:
                await ends.replayed(self._sets)
            await ends.delivered(self._sets)
            await ends.spool_is_empty()
            how = "failed, replayed, delivered" if self._scenario.replayed else "delivered"
            return f"{len(self.crashes)} {how}"
        real = [one for one in self.crashes if isinstance(one, RealCrash)]
        told = await ends.told(real)
        lost = {crash.pid for crash, end in zip(real, told, strict=True) if end != "delivered"}
        assert lost <= self.may_be_lost, (lost, self.may_be_lost)
        return ", ".join(f"{count} {end}" for end, count in Counter(told).items())
