"""How fast a core that lies on disk becomes a complete, verified object at an S3 server.

By turns with minio's own ``fput_object`` of the same file, raw, and with zipping it with deflate
and sending that, as a crash handler for containers does. The least time of each counts::

    .venv/bin/python -m benchmarks.throughput [MiB]
"""

import asyncio
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from benchmarks import pipeline
from benchmarks.pipeline import MIB, Pipeline, plot, seconds, table

ROUNDS = 3
# What a program has in its memory: many small objects.
_PROGRAM = "d={{i: [str(i), float(i)] for i in range({})}}; print('ready', flush=True); input()"
_OBJECTS_IN_A_MIB = 4240


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    with tempfile.TemporaryDirectory(prefix="bench-core-") as place, pipeline.s3_server() as s3:
        core = real_core(Path(place), mib)
        asyncio.run(measure(core, s3))


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


async def measure(core: Path, s3: pipeline.S3Server) -> None:
    size = core.stat().st_size
    ours, raw, zipped, stored = [], [], [], 0
    async with pipeline.running(s3) as running:
        for number in range(ROUNDS):
            took, stored = await crashbus(running, core, number)
            ours.append(took)
            raw.append(await asyncio.to_thread(fput, running, core))
            if number == 0:
                zipped.append(await asyncio.to_thread(zip_and_put, running, core))
    best = min(ours)
    print(f"\na core of {size / MIB:.0f} MiB, {stored / MIB:.0f} MiB as it is stored\n")
    rates = [
        ("Crashbus", best),
        ("fput_object of the raw file", min(raw)),
        ("zip, then fput_object", min(zipped)),
    ]
    table(
        ("way", "s", "MiB of core a second", "Crashbus is faster by"),
        [
            (name, f"{took:.1f}", f"{size / MIB / took:.0f}", f"{took / best:.1f}")
            for name, took in rates
        ],
    )
    plot([(name, size / MIB / took) for name, took in rates], "MiB/s")


async def crashbus(running: Pipeline, core: Path, seed: int) -> tuple[float, int]:
    """Return the seconds from a set's appearance to its core's receipt, and the size stored."""
    writing = asyncio.to_thread(running.hand_over, core, seed)
    crash = await writing
    appeared = max(path.stat().st_ctime for path in running.spool.iterdir())
    (receipt,) = await running.receipts(crash, "core")
    return receipt.time - appeared, receipt.file.stored_size


def fput(running: Pipeline, core: Path) -> float:
    started = time.monotonic()
    running.s3.fput_object(running.bucket, "raw", str(core))
    return seconds(started)


def zip_and_put(running: Pipeline, core: Path) -> float:
    started, archive = time.monotonic(), running.scratch / "core.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipping:
        zipping.write(core)
    running.s3.fput_object(running.bucket, "zipped", str(archive))
    took = seconds(started)
    archive.unlink()
    return took


if __name__ == "__main__":
    main()
