"""Many small crashes at once: is one lost, how long until all are delivered, and with what memory?

Each is a real process; eight die at a time, as fast as they are let go::

    .venv/bin/python -m benchmarks.burst [crashes]
"""

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from benchmarks import pipeline
from benchmarks.pipeline import MIB, WITHIN, Pipeline, peak_of, seconds, table
from crashbus import DeadLetter, Receipt
from tests.support.crashers import crasher
from tests.support.s3 import S3Server
from tests.support.wait import until

AT_ONCE = 8


def main() -> None:
    crashes = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with pipeline.s3_server() as s3:
        asyncio.run(measure(s3, crashes))


async def measure(s3: S3Server, crashes: int) -> None:
    program = str(crasher("null_pointer"))
    async with pipeline.running(s3, shippers=2, real=True) as running:
        started = time.monotonic()
        left = iter(range(crashes))
        await asyncio.gather(*(die(program, left) for _ in range(AT_ONCE)))
        died = seconds(started)
        with suppress(TimeoutError):
            await until(lambda: are_delivered(running, crashes), WITHIN, every=3)
        drained = seconds(started)
        lost = crashes - await delivered(running)
        letters = await running.bus.stored(DeadLetter)
        services = [running.collector, *running.shippers, *running.capture]
        peaks = [(one.name, peak_of(one) / MIB) for one in services]
    table(
        ("crashes", "lost", "dead letters", "all died after, s", "all delivered after, s"),
        [(crashes, lost, len(letters), f"{died:.0f}", f"{drained:.0f}")],
    )
    table(("service", "peak, MiB"), [(name, f"{peak:.0f}") for name, peak in peaks])


async def die(program: str, left: Iterator[int]) -> None:
    for _ in left:
        process = await asyncio.create_subprocess_exec(program, cwd="/tmp")
        await process.wait()


async def are_delivered(running: Pipeline, crashes: int) -> bool:
    return await delivered(running) >= crashes


async def delivered(running: Pipeline) -> int:
    """Return how many crashes are at the server, manifest and all."""
    receipts = await running.bus.stored(Receipt)
    return sum(one.file.kind == "manifest" for one in receipts)


if __name__ == "__main__":
    main()
