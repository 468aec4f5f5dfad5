"""A pipeline for all scenarios of a module; after one that failed, a new one."""

import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio

from tests.faults import seeds
from tests.faults.crashes import MIB
from tests.faults.report import PROPERTY
from tests.faults.rig import Rig
from tests.faults.scenarios import ALL, Scenario
from tests.faults.start import running
from tests.faults.trial import Trial
from tests.support.requirements import need_program, need_root
from tests.support.s3 import S3Server

LARGEST = int(os.environ.get("FAULT_MIB", "8"))  # MiB of a core at most
SEED = os.environ.get("FAULT_SEED")

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

    async def drop(self) -> None:
        """End it."""
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
    await made.drop()


@pytest_asyncio.fixture(loop_scope="module")
async def try_out(
    rigs: Rigs, record_property: Callable[[str, object], None], pytestconfig: pytest.Config
) -> Try:
    """Return what runs a scenario and checks how it ends."""

    async def run(scenario: Scenario) -> None:
        cache = pytestconfig.cache
        assert cache is not None
        seed = int(SEED) if SEED else seeds.draw(cache, scenario.name)
        print(f"FAULT_SEED={seed}")
        rig, started = await rigs.get(), time.monotonic()
        trial = Trial(rig, scenario, Random(seed))
        result = {"order": ALL.index(scenario), "name": scenario.name, "seed": seed}
        try:
            await trial.suffer()
            result["hit"] = ", ".join(f"{number} {what}" for what, number in trial.hits.items())
            result["ended"] = await trial.end()
            await rig.healthy()
            if not SEED:
                seeds.passed(cache, scenario.name)
        except BaseException:
            await rigs.drop()
            raise
        finally:
            result["largest"] = LARGEST
            result["crashes"] = len(trial.crashes)
            result["mib"] = round(sum(crash.size for crash in trial.crashes) / MIB, 1)
            result["seconds"] = round(time.monotonic() - started, 1)
            record_property(PROPERTY, result)

    return run
