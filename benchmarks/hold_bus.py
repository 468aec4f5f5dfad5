"""What it costs a crashing process that its core goes straight to the bus, with no copy on disk.

From its fatal signal until its parent's waitpid returns, by turns with a copy on disk, with the
bus's store on the same disk; the least time of each counts. Then the memory that recorder and
collector took at most. Needs root and some 4 GiB of memory and disk::

    .venv/bin/python -m benchmarks.hold_bus [--rounds N] [largest MiB]
"""

import argparse
import asyncio
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.hold_time import Start, held, programs
from crashbus import connect
from crashbus.layout import CORES
from tests.support.core_pattern import core_pattern_kept
from tests.support.nats import NatsServer
from tests.support.service import ServiceProcess
from tests.support.wait import until

ROUNDS = 3
LARGEST = 1024  # MiB
TITLES = ("incompressible 64 MiB", "incompressible 1024 MiB", "Python")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hold_bus")
    parser.add_argument("largest", nargs="?", type=int, default=LARGEST, help="MiB")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    print(f"seconds held, least of {asked.rounds} rounds; MiB of memory at most")
    print(f"{'memory':24}{'disk':>9}{'bus':>9}{'ratio':>7}{'recorder':>10}{'collector':>11}")
    with tempfile.TemporaryDirectory(prefix="hold-") as name, core_pattern_kept():
        place = Path(name)
        place.chmod(0o755)
        for title, start in programs(place, asked.largest):
            if title in TITLES:
                asyncio.run(measure(title, start, asked.rounds))


async def measure(title: str, start: Start, rounds: int) -> None:
    """Print one row."""
    took: dict[str, list[float]] = {"disk": [], "bus": []}
    peaks = (0, 0)
    for _ in range(rounds):
        for way, times in took.items():
            async with services(way) as running:
                times.append(await asyncio.to_thread(held, start))
                peaks = peak(running[0].pid), peak(running[1].pid)
    disk, bus = min(took["disk"]), min(took["bus"])
    print(
        f"{title:24}{disk:>9.3f}{bus:>9.3f}{bus / disk:>7.1f}{peaks[0]:>10}{peaks[1]:>11}",
        flush=True,
    )


def peak(pid: int) -> int:
    """Return how many MiB a process had at most."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) >> 10


@asynccontextmanager
async def services(way: str) -> AsyncIterator[tuple[ServiceProcess, ServiceProcess]]:
    """Run recorder and collector on a spool and a bus of their own."""
    with tempfile.TemporaryDirectory(prefix="cb-", dir="/tmp") as name:
        scratch = Path(name)
        scratch.chmod(0o755)
        nats = NatsServer(scratch)
        nats.start()
        environment = {
            "CRASHBUS_NATS_URL": nats.url,
            "CRASHBUS_STATE": str(scratch / "state"),
            "CRASHBUS_SPOOL": str(scratch / "appscope"),
            "CRASHBUS_DESTINATIONS": "file:///nowhere",
            "CRASHBUS_RECORDER_SOCKET": str(scratch / "run" / "s"),
            "CRASHBUS_RECORDER_CORE_TO": way,
        }
        recorder, collector = (
            ServiceProcess(one, scratch, environment) for one in ("recorder", "collector")
        )
        try:
            async with connect(nats.url):
                for service in (collector, recorder):
                    await service.start()
                    await service.healthy()
                await until((scratch / "appscope" / CORES / "socket").exists)
                yield recorder, collector
        finally:
            for service in (recorder, collector):
                await service.stop()
            nats.stop()


if __name__ == "__main__":
    main()
