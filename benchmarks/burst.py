"""Many small crashes at once: is one lost, how long until all are delivered, and with what memory?

Each is a real process; eight die at a time, as fast as they are let go. What else crashes on the
host meanwhile is delivered, too, and not counted::

    .venv/bin/python -m benchmarks.burst [crashes]
"""

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from benchmarks import pipeline
from benchmarks.pipeline import MIB, WITHIN, Pipeline, peak_of, seconds, table
from crashbus import DeadLetter, Manifest, Receipt
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
        pids: set[int] = set().union(
            *await asyncio.gather(*(die(program, left) for _ in range(AT_ONCE)))
        )
        died = seconds(started)
        with suppress(TimeoutError):
            await until(lambda: are_delivered(running, pids, crashes), WITHIN, every=3)
        drained = seconds(started)
        ours = await crashes_of(running, pids)
        lost = crashes - len(await delivered(running, ours))
        letters = [one for one in await running.bus.stored(DeadLetter) if one.crash_id in ours]
        services = [running.collector, *running.shippers, *running.capture]
        peaks = [(one.name, peak_of(one) / MIB) for one in services]
    table(
        ("crashes", "lost", "dead letters", "all died after, s", "all delivered after, s"),
        [(crashes, lost, len(letters), f"{died:.0f}", f"{drained:.0f}")],
    )
    table(("service", "peak, MiB"), [(name, f"{peak:.0f}") for name, peak in peaks])


async def die(program: str, left: Iterator[int]) -> set[int]:
    """Return the PIDs of those who died."""
    pids = set()
    for _ in left:
        process = await asyncio.create_subprocess_exec(program, cwd="/tmp")
        await process.wait()
        pids.add(process.pid)
    return pids


async def are_delivered(running: Pipeline, pids: set[int], crashes: int) -> bool:
    return len(await delivered(running, await crashes_of(running, pids))) >= crashes


async def crashes_of(running: Pipeline, pids: set[int]) -> set[str]:
    """Return the IDs of the crashes of these processes; a PID may have been given twice."""
    return {one.crash_id for one in await running.bus.stored(Manifest) if one.process.pid in pids}


async def delivered(running: Pipeline, crash_ids: set[str]) -> set[str]:
    """Return which of these crashes are at the server, manifest and all."""
    receipts = await running.bus.stored(Receipt)
    done = {one.crash_id for one in receipts if one.file.kind == "manifest"}
    return done & crash_ids


if __name__ == "__main__":
    main()
