"""A benchmark of the whole pipeline still runs; `make lint` sees to what the others call."""

import asyncio

import pytest

from benchmarks import latency
from tests.support.s3 import S3Server


def test_benchmark_of_one_crash(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(latency.measure(s3, count=1, mib=1))

    assert "while cores of 1 MiB ship" in capsys.readouterr().out
