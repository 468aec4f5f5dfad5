"""A pipeline for all scenarios of a module; after one that failed, a new one."""

import asyncio
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import pytest_asyncio

from tests.faults.crashes import MIB, CrashSet, core_size, write_set
from tests.faults.report import PROPERTY
from tests.faults.rig import HOST, Rig, running
from tests.faults.scenarios import Scenario
from tests.support.requirements import need_program, need_root
from tests.support.s3 import S3Server

CRASHES = int(os.environ.get("FAULT_CRASHES", "3"))  # of each scenario
LARGEST = int(os.environ.get("FAULT_MIB", "8"))  # MiB of a core at most
SEED = os.environ.get("FAULT_SEED")
FAULT_EACH = 10  # crashes: with many of them, the fault comes several times

Try = Callable[[Scenario], Awaitable[None]]


class Rigs:
    """Hands out the pipeline that runs, or a new one."""

    def __init__(self, s3: S3Server) -> None:
        self._s3 = s3
        self._stack = AsyncExitStack()
        self._rig: Rig | None = None

    async def get(self) -> Rig:
        if self._rig is None:
            scratch = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-"))
            self._rig = await self._stack.enter_async_context(
                running(Path(scratch), self._s3, LARGEST)
            )
        return self._rig

    async def finish(self) -> None:
        """End it once it has removed what was delivered."""
        try:
            if self._rig is not None:
                await self._rig.spool_is_empty()
        finally:
            await self.drop()

    async def drop(self) -> None:
        """End it: what became of it is not known."""
        self._rig = None
        await self._stack.aclose()
        self._s3.ensure_gateway()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rigs(s3_session: S3Server) -> AsyncIterator[Rigs]:
    need_root()
    for program in ("nats-server", "mkfs.ext4"):
        need_program(program)
    s3_session.ensure_gateway()
    made = Rigs(s3_session)
    yield made
    await made.finish()


@pytest_asyncio.fixture(loop_scope="module")
async def try_out(rigs: Rigs, record_property: Callable[[str, object], None]) -> Try:
    """Return what runs a scenario and checks how it ends."""

    async def run(scenario: Scenario) -> None:
        seed = int(SEED) if SEED else secrets.randbelow(1_000_000)
        print(f"FAULT_SEED={seed}")
        rig, random, started = await rigs.get(), Random(seed), time.monotonic()
        result = {"order": time.time(), "name": scenario.name, "crashes": CRASHES, "seed": seed}
        crashes: list[CrashSet] = []
        try:
            await _suffer(rig, scenario, random, crashes)
            await rig.delivered(crashes)
            await rig.healthy()
        except BaseException:
            await rigs.drop()
            raise
        finally:
            mib = sum(crash.size for crash in crashes) / MIB
            seconds = time.monotonic() - started
            record_property(PROPERTY, {**result, "mib": mib, "seconds": seconds})

    return run


async def _suffer(rig: Rig, scenario: Scenario, random: Random, crashes: list[CrashSet]) -> None:
    """Let crashes come, and the fault, and let it be over."""
    rounds = max(1, CRASHES // FAULT_EACH)
    for number in range(rounds):
        count = CRASHES // rounds + (number < CRASHES % rounds)
        crashing = _crash(rig, scenario, count, Random(random.random()), crashes)
        if scenario.first:
            async with scenario.fault(rig, random):
                await crashing
                await asyncio.sleep(random.uniform(*scenario.lasts))
                if scenario.replayed:
                    await rig.failed(crashes[-count:])
        else:
            task = asyncio.create_task(crashing)
            await asyncio.sleep(random.uniform(0, 1.5))
            async with scenario.fault(rig, random):
                await asyncio.sleep(random.uniform(*scenario.lasts))
            await task
    if scenario.replayed:
        await rig.replay()


async def _crash(
    rig: Rig, scenario: Scenario, count: int, random: Random, crashes: list[CrashSet]
) -> None:
    for _ in range(count):
        size = LARGEST * MIB if scenario.noisy else core_size(random, LARGEST)
        writing = asyncio.to_thread(write_set, rig.spool, HOST, size, random, scenario.noisy)
        crashes.append(await writing)
        await asyncio.sleep(random.uniform(0, 0.3))
