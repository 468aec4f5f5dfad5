"""What failed is run again as it was."""

import pytest

from tests.faults import seeds


def test_run_that_failed_keeps_its_seed_until_it_passes(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = pytest.Cache(tmp_path_factory.mktemp("cache"), pytestconfig, _ispytest=True)
    first = seeds.draw(cache, "S3: SlowDown")

    assert seeds.draw(cache, "S3: SlowDown") == first
    others = {seeds.draw(cache, f"another {number}") for number in range(20)}
    assert len(others) > 1

    seeds.passed(cache, "S3: SlowDown")
    drawn = set()
    for _ in range(20):
        drawn.add(seeds.draw(cache, "S3: SlowDown"))
        seeds.passed(cache, "S3: SlowDown")
    assert len(drawn) > 1
