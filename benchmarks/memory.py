"""How much memory collector and shipper have while a core passes through them::

.venv/bin/python -m benchmarks.memory [MiB …]
"""

import asyncio
import sys
import tempfile
from pathlib import Path
from random import Random

from benchmarks import pipeline
from benchmarks.pipeline import MIB, peak_of, plot, table
from tests.support.s3 import S3Server

SIZES = (64, 1024, 8192)  # MiB
_NOISE = 16  # one MiB in so many is noise, as in the core of a program with a large, sparse heap


def main() -> None:
    sizes = [int(one) for one in sys.argv[1:]] or SIZES
    with pipeline.s3_server() as s3:
        asyncio.run(measure(s3, sizes))


def sparse_core(path: Path, mib: int) -> None:
    random = Random(mib)
    with path.open("wb") as file:
        for number in range(0, mib, _NOISE):
            file.seek(number * MIB)
            file.write(random.randbytes(MIB))
        file.truncate(mib * MIB)


async def measure(s3: S3Server, sizes: list[int] | tuple[int, ...]) -> None:
    rows = []
    async with pipeline.running(s3) as running:
        with tempfile.TemporaryDirectory(prefix="bench-core-") as place:
            for number, mib in enumerate(sizes):
                core = Path(place) / "core"
                sparse_core(core, mib)
                for service in (running.collector, *running.shippers):
                    peak_of(service)
                crash = await asyncio.to_thread(running.hand_over, core, number)
                await running.receipts(crash, "core")
                peaks = [peak_of(one) / MIB for one in (running.collector, running.shippers[0])]
                rows.append((mib, *peaks))
    table(
        ("core, MiB", "collector, MiB", "shipper, MiB"),
        [(mib, f"{ours:.0f}", f"{theirs:.0f}") for mib, ours, theirs in rows],
    )
    plot([(f"{mib} MiB, collector", ours) for mib, ours, _ in rows], "MiB")
    plot([(f"{mib} MiB, shipper", theirs) for mib, _, theirs in rows], "MiB")


if __name__ == "__main__":
    main()
