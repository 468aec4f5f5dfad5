"""The S3 server fails, or the way to it; see `docs/reliability.md`."""

import pytest

from tests.faults.conftest import Try
from tests.faults.scenarios import S3, Scenario

REAL = False
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("scenario", S3, ids=str)
async def test_every_crash_is_delivered_whole_and_once(try_out: Try, scenario: Scenario) -> None:
    await try_out(scenario)
