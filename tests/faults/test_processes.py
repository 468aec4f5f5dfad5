"""A process of ours is killed or stopped while it delivers; `docs/reliability.md` has the table."""

import pytest

from tests.faults.conftest import Try
from tests.faults.scenarios import PROCESSES, Scenario

REAL = False
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("scenario", PROCESSES, ids=str)
async def test_every_crash_is_delivered_whole_and_once(try_out: Try, scenario: Scenario) -> None:
    await try_out(scenario)
