"""The bus fails, or the way to it, or someone meddles with it; see `docs/reliability.md`."""

import pytest

from tests.faults.conftest import Try
from tests.faults.scenarios import BUS, Scenario

REAL = False
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("scenario", BUS, ids=str)
async def test_every_crash_is_delivered_whole_and_once(try_out: Try, scenario: Scenario) -> None:
    await try_out(scenario)
