"""What the README promises of its commands is so; tests/compose/readme.py runs them."""

import pytest

from tests.compose.delivery import WHOLE
from tests.compose.readme import Walk

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_without_env_a_crash_lies_in_the_volume_and_the_log_says_so(walked: Walk) -> None:
    (crash,) = walked.in_volume

    assert crash.signal_name == "SIGSEGV"
    assert {file.kind for file in crash.files} >= WHOLE
    assert "destination is ready" in walked.log
    assert "destination=file:///var/crashes" in walked.log


async def test_log_shows_how_core_pattern_was_changed(walked: Walk) -> None:
    assert "core_pattern changed" in walked.log
    assert f"old='{walked.core_pattern}'" in walked.log


async def test_commands_lead_to_a_container_s_crash_in_the_bucket(walked: Walk) -> None:
    (crash,) = walked.in_bucket

    assert crash.signal_name == "SIGSEGV"
    assert {file.kind for file in crash.files} >= WHOLE
    assert crash.process.container is not None
    assert crash.crash_id != walked.in_volume[0].crash_id
    assert crash.crash_id[:4] in walked.listed


async def test_as_many_shippers_run_as_were_asked_for(walked: Walk) -> None:
    assert walked.shippers == 3
