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
_NOISE = 64 * 1024  # bytes of each MiB that do not compress
_WORD = 16  # bytes


def main() -> None:
    sizes = [int(one) for one in sys.argv[1:]] or SIZES
    with pipeline.s3_server() as s3:
        asyncio.run(measure(s3, sizes))


def heap_core(path: Path, mib: int) -> None:
    """Write what compresses as a program's heap does, to a seventh; nothing of it is a hole."""
    random = Random(mib)
    words = [random.randbytes(_WORD) for _ in range(32)]
    objects = b"".join(random.choices(words, k=(MIB - _NOISE) // _WORD))
    with path.open("wb") as file:
        for number in range(mib):
            at = number * _WORD % len(objects)
            file.write(random.randbytes(_NOISE) + objects[at:] + objects[:at])


async def measure(s3: S3Server, sizes: list[int] | tuple[int, ...]) -> None:
    rows = []
    async with pipeline.running(s3) as running:
        with tempfile.TemporaryDirectory(prefix="bench-core-") as place:
            for number, mib in enumerate(sizes):
                core = Path(place) / "core"
                heap_core(core, mib)
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
