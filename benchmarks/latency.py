"""How long after a crash its four small files lie at the S3 server, alone and beside a large core.

AppScope's library waits for 2 s and its daemon for 1 s, whatever there is to do; these 3 s are what
is compared with::

    .venv/bin/python -m benchmarks.latency [crashes] [MiB of the large core]
"""

import asyncio
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import pipeline
from benchmarks.memory import heap_core
from benchmarks.pipeline import WITHIN, Pipeline, plot, table
from crashbus import Receipt
from tests.faults import crashes
from tests.support.s3 import S3Server
from tests.support.wait import until

SMALL = ("info", "backtrace", "snapshot", "cfg")
APPSCOPE = 3.0  # seconds


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    mib = int(sys.argv[2]) if len(sys.argv) > 2 else 4096
    with pipeline.s3_server() as s3:
        asyncio.run(measure(s3, count, mib))


async def measure(s3: S3Server, count: int, mib: int) -> None:
    async with pipeline.running(s3, real=True) as running:
        await crash(running)  # the first one brings the binaries
        alone = [await crash(running) for _ in range(count)]
        beside = await crashes_beside(running, mib, count)
    rows = [("by themselves", alone), (f"while cores of {mib} MiB ship", beside)]
    table(
        ("crashes", "number", "p50, s", "p99, s", "p50 of AppScope's waits"),
        [
            (name, len(one), f"{p50(one):.2f}", f"{p99(one):.2f}", f"{p50(one) / APPSCOPE:.2f}")
            for name, one in rows
        ],
    )
    plot([(f"{name}, p50", p50(one)) for name, one in rows] + [("AppScope's waits", 3.0)], "s")


async def crashes_beside(running: Pipeline, mib: int, count: int) -> list[float]:
    """Return how long so many took; while a large core ships, then another, until there are all."""
    took: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-core-") as place:
        core = Path(place) / "core"
        heap_core(core, mib)
        while len(took) < count:
            large = await asyncio.to_thread(running.hand_over, core, len(took))
            shipping = asyncio.create_task(running.receipts(large, "core"))
            while not shipping.done() and len(took) < count:
                took.append(await crash(running))
            await shipping
    return took


async def crash(running: Pipeline) -> float:
    """Return the seconds from a process's signal until its small files are confirmed."""
    died = await crashes.crash(await crashes.victim(1), 1)

    async def look() -> float:
        found = await running.bus.stored(Receipt, f"crash.shipped.*.{died.crash_id}")
        times = [one.time for one in found if one.file.kind in SMALL]
        return max(times) - died.at if len(times) == len(SMALL) else 0

    return await until(look, WITHIN, every=0.1)


def p50(values: list[float]) -> float:
    return statistics.median(values)


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.99 * len(values)))]


if __name__ == "__main__":
    main()
