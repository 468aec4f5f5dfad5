"""A pipeline for all scenarios of a module; after one that failed, a new one."""

import asyncio
import os
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio

from tests.faults.crashes import MIB, CrashSet, RealCrash, core_pieces, core_size, crash, write_set
from tests.faults.report import PROPERTY
from tests.faults.rig import HOST, Rig, running
from tests.faults.scenarios import ALL, Scenario
from tests.support.requirements import need_program, need_root
from tests.support.s3 import S3Server

CRASHES = int(os.environ.get("FAULT_CRASHES", "3"))  # of each scenario
LARGEST = int(os.environ.get("FAULT_MIB", "8"))  # MiB of a core at most
SEED = os.environ.get("FAULT_SEED")
FAULT_EACH = 10  # crashes: with many of them, the fault comes several times

Try = Callable[[Scenario], Awaitable[None]]


class Rigs:
    """Hands out the pipeline that runs, or a new one.

    Args:
        real: it has a recorder and a detector.
    """

    def __init__(self, s3: S3Server, *, real: bool) -> None:
        self._s3 = s3
        self._real = real
        self._stack = AsyncExitStack()
        self._rig: Rig | None = None

    async def get(self) -> Rig:
        if self._rig is None:
            scratch = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-"))
            self._rig = await self._stack.enter_async_context(
                running(Path(scratch), self._s3, LARGEST, real=self._real)
            )
        return self._rig

    async def finish(self) -> None:
        """End it once it has removed what was delivered."""
        try:
            if self._rig is not None and not self._real:
                await self._rig.spool_is_empty()
        finally:
            await self.drop()

    async def drop(self) -> None:
        """End it: what became of it is not known."""
        self._rig = None
        await self._stack.aclose()
        self._s3.ensure_gateway()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rigs(s3_session: S3Server, request: pytest.FixtureRequest) -> AsyncIterator[Rigs]:
    need_root()
    for program in ("nats-server", "mkfs.ext4"):
        need_program(program)
    s3_session.ensure_gateway()
    made = Rigs(s3_session, real=request.module.REAL)
    await made.get()  # here, for it may wait long for the host's one core_pattern
    yield made
    await made.finish()


@pytest_asyncio.fixture(loop_scope="module")
async def try_out(rigs: Rigs, record_property: Callable[[str, object], None]) -> Try:
    """Return what runs a scenario and checks how it ends."""

    async def run(scenario: Scenario) -> None:
        seed = int(SEED) if SEED else secrets.randbelow(1_000_000)
        print(f"FAULT_SEED={seed}")
        rig, started = await rigs.get(), time.monotonic()
        trial = Trial(rig, scenario, Random(seed))
        result = {"order": ALL.index(scenario), "name": scenario.name, "seed": seed}
        try:
            await trial.suffer()
            result["ended"] = await trial.end()
            await rig.healthy()
        except BaseException:
            await rigs.drop()
            raise
        finally:
            result["crashes"] = len(trial.crashes)
            result["mib"] = round(sum(crash.size for crash in trial.crashes) / MIB, 1)
            result["seconds"] = round(time.monotonic() - started, 1)
            record_property(PROPERTY, result)

    return run


class Trial:
    """One scenario, once."""

    def __init__(self, rig: Rig, scenario: Scenario, random: Random) -> None:
        self._rig = rig
        self._scenario = scenario
        self._random = random
        self.crashes: list[CrashSet | RealCrash] = []

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
        # Of its own seed, for both draw from theirs at the same time.
        crashing = self._crash(count, Random(random.random()))
        if scenario.first:
            async with scenario.fault(rig, random):
                await crashing
                await asyncio.sleep(random.uniform(*scenario.lasts))
                if scenario.replayed:
                    await rig.failed(self._sets[-count:])
        else:
            task = asyncio.create_task(crashing)
            await asyncio.sleep(random.uniform(0, 1.5))
            async with scenario.fault(rig, random):
                await asyncio.sleep(random.uniform(*scenario.lasts))
            await task

    async def _crash(self, count: int, random: Random) -> None:
        for _ in range(count):
            self.crashes.append(await self._one(random))
            await asyncio.sleep(random.uniform(0, 0.3))

    async def _one(self, random: Random) -> CrashSet | RealCrash:
        noisy = self._scenario.noisy
        size = LARGEST * MIB if noisy else core_size(random, LARGEST)
        if self._rig.capture:
            return await crash(size // MIB)
        core = core_pieces(size, random, noisy=noisy)
        return await asyncio.to_thread(write_set, self._rig.spool, HOST, core, random)

    async def end(self) -> str:
        """Return how it ended for the crashes, once that is as it must be."""
        if not self._rig.capture:
            if self._scenario.replayed:
                await self._rig.replayed(self._sets)
            await self._rig.delivered(self._sets)
            how = "failed, replayed, delivered" if self._scenario.replayed else "delivered"
            return f"{len(self.crashes)} {how}"
        real = [one for one in self.crashes if isinstance(one, RealCrash)]
        ends = Counter(await self._rig.told(real))
        assert self._scenario.gap or ends["delivered"] == len(real), ends
        return ", ".join(f"{count} {end}" for end, count in ends.items())
