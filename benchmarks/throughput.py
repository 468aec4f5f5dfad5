"""How fast a core that lies on disk becomes a complete, verified object at an S3 server.

By turns with minio's own ``fput_object`` of the same file, raw, and with zipping it with deflate
and sending that, as a crash handler for containers does. The least time of each counts. First with
the S3 server on loopback, then over a link, as buckets are::

    .venv/bin/python -m benchmarks.throughput [MiB] [Mbit/s of the link; 0: without that part]
"""

import asyncio
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from benchmarks import pipeline
from benchmarks.link import link
from benchmarks.pipeline import MIB, Pipeline, Processors, plot, seconds, table
from crashbus import Receipt
from crashbus.layout import Kind
from tests.support.s3 import S3Server
from tests.support.wait import until

ROUNDS = 3
# What a program has in its memory: many small objects.
_PROGRAM = "d={{i: [str(i), float(i)] for i in range({})}}; print('ready', flush=True); input()"
_OBJECTS_IN_A_MIB = 4240


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    mbit = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    with tempfile.TemporaryDirectory(prefix="bench-core-") as place:
        core = real_core(Path(place), mib)
        with pipeline.s3_server() as s3:
            asyncio.run(measure(core, s3, "on loopback"))
        if mbit:
            with link(mbit) as way, pipeline.s3_server(way.address, way.there) as s3:
                asyncio.run(measure(core, s3, f"over a link of {mbit} Mbit/s"))


def real_core(place: Path, mib: int) -> Path:
    """Return a core of a living Python process with about so much memory, by gdb."""
    program = _PROGRAM.format(mib * _OBJECTS_IN_A_MIB)
    process = subprocess.Popen(
        ["/usr/bin/python3", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(["gcore", "-o", place / "core", str(process.pid)], check=True, **quiet)  # type: ignore[call-overload]
    process.kill()
    process.wait()
    return place / f"core.{process.pid}"


@dataclass(frozen=True)
class Run:
    """One way, once.

    Attributes:
        idle: share of all processors' time that was left over.
        used: processor seconds of each part.
    """

    took: float
    idle: float
    used: dict[str, float]


async def measure(core: Path, s3: S3Server, where: str) -> None:
    size = core.stat().st_size
    ours, raw, zipped, stored = [], [], [], 0
    async with pipeline.running(s3) as running:
        for number in range(ROUNDS):
            run, stored = await crashbus(running, core, number)
            ours.append(run)
            raw.append(await asyncio.to_thread(timed, running, core, fput))
            if number == 0:
                zipped.append(await asyncio.to_thread(timed, running, core, zip_and_put))
    best = {
        "Crashbus": least(ours),
        "fput_object of the raw file": least(raw),
        "zip, then fput_object": least(zipped),
    }
    print(f"\n{where}: a core of {size / MIB:.0f} MiB, {stored / MIB:.0f} MiB as it is stored\n")
    first = best["Crashbus"].took
    table(
        ("way", "s", "MiB of core a second", "Crashbus is faster by"),
        [
            (name, f"{run.took:.1f}", f"{size / MIB / run.took:.0f}", f"{run.took / first:.1f}")
            for name, run in best.items()
        ],
    )
    plot([(name, size / MIB / run.took) for name, run in best.items()], "MiB/s")
    print("\nprocessor seconds of the same rounds, and what was left over of all processors\n")
    table(
        ("way", "all", *best["Crashbus"].used, "idle"),
        [
            (
                name,
                f"{sum(run.used.values()):.1f}",
                *(f"{one:.1f}" for one in run.used.values()),
                f"{run.idle:.0%}",
            )
            for name, run in best.items()
        ],
    )


def least(runs: list[Run]) -> Run:
    return min(runs, key=lambda run: run.took)


async def crashbus(running: Pipeline, core: Path, seed: int) -> tuple[Run, int]:
    """Return what it took from a set's appearance to its core's receipt, and the size stored."""
    awaited = asyncio.create_task(_receipt_of_a_core(running))
    await asyncio.to_thread(running.hand_over, core, seed)
    processors = Processors(running.processes())
    appeared = max(path.stat().st_ctime for path in running.spool.iterdir())
    receipt = await asyncio.wait_for(awaited, pipeline.WITHIN)
    run = Run(receipt.time - appeared, processors.idle(), processors.seconds())
    await until(lambda: _is_tidy(running), pipeline.WITHIN)
    return run, receipt.file.stored_size


async def _receipt_of_a_core(running: Pipeline) -> Receipt:
    """Wait for the next one; asking for it again and again would cost time that is measured."""
    async with aclosing(running.bus.subscribe(Receipt)) as receipts:
        async for receipt in receipts:
            if receipt.file.kind is Kind.CORE:
                return receipt
    raise RuntimeError("the bus is closed")


async def _is_tidy(running: Pipeline) -> bool:
    """Tell whether nothing is left on the bus, so that the next measurement begins undisturbed."""
    return not await running.bus.crashes_on_the_way(pipeline.HOST)


def timed(running: Pipeline, core: Path, way: Callable[[Pipeline, Path], None]) -> Run:
    started, processors = time.monotonic(), Processors(running.processes())
    way(running, core)
    return Run(seconds(started), processors.idle(), processors.seconds())


def fput(running: Pipeline, core: Path) -> None:
    running.s3.fput_object(running.bucket, "raw", str(core))


def zip_and_put(running: Pipeline, core: Path) -> None:
    archive = running.scratch / "core.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipping:
        zipping.write(core)
    running.s3.fput_object(running.bucket, "zipped", str(archive))
    archive.unlink()


if __name__ == "__main__":
    main()
