"""Faults while real processes crash: none is lost unseen; see `docs/reliability.md`."""

import pytest

from tests.faults.conftest import Try
from tests.faults.scenarios import CAPTURE, Scenario

REAL = True
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("scenario", CAPTURE, ids=str)
async def test_every_crash_is_delivered_or_told(try_out: Try, scenario: Scenario) -> None:
    await try_out(scenario)
