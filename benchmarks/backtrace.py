"""How soon a large crash has its backtrace: 1 GiB of memory, 100 threads.

From the moment at which the crashed process is let go until its backtrace is written; the recorder
has seen a crash before. The peer is gdb's `thread apply all bt` of the same
core. Needs root, gdb and 3 GiB of disk::

    .venv/bin/python -m benchmarks.backtrace [--rounds N] [--threads N] [MiB]
"""

import argparse
import asyncio
import json
import os
import subprocess
import time
from pathlib import Path

from tests.support import core_pattern
from tests.support.crashers import crasher
from tests.support.recorder import RecorderService, crash

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backtrace")
    parser.add_argument("mib", nargs="?", type=int, default=1024, metavar="MiB")
    parser.add_argument("--threads", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    with core_pattern.core_pattern_kept():
        rounds = asyncio.run(measure(asked.mib, asked.threads, asked.rounds))
    ours, gdbs = (min(times) for times in zip(*rounds, strict=True))
    print(f"{asked.mib} MiB, {asked.threads} threads, least of {asked.rounds} rounds:")
    print(f"  let go until the backtrace is written {ours:7.2f} s")
    print(f"  gdb -batch, thread apply all bt       {gdbs:7.2f} s")
    print(f"  Crashbus's share                      {ours / gdbs:7.2f}")


async def measure(mib: int, threads: int, rounds: int) -> list[tuple[float, float]]:
    """Return for each round the seconds that Crashbus took, and gdb."""
    recorder = RecorderService()
    try:
        await recorder.start()
        await recorder.captured(crash(crasher("null_pointer"))[0])
        return [await _round(recorder, mib, threads) for _ in range(rounds)]
    finally:
        await asyncio.to_thread(recorder.close)


async def _round(recorder: RecorderService, mib: int, threads: int) -> tuple[float, float]:
    program = crasher("threads")
    # The one that crashes and the first are threads, too.
    pid, _ = await asyncio.to_thread(crash, program, str(threads - 2), str(mib), within=300)
    record = await recorder.captured(pid, 300)
    # Not when the parent knows the end: to free so much memory takes longer than the backtrace.
    held = json.loads(recorder.file(pid, "snapshot").read_text())["HoldMilliseconds"]
    let_go = record.crashed_at + held / 1000
    written = recorder.file(pid, "backtrace").stat().st_mtime
    told = json.loads(recorder.file(pid, "backtrace_json").read_text())
    assert len(told["threads"]) == threads, f"{len(told['threads'])} of {threads} threads"
    core = recorder.file(pid, "core")
    gdbs = await asyncio.to_thread(_gdb, program, core)
    core.unlink()
    os.sync()
    return written - let_go, gdbs


def _gdb(program: Path, core: Path) -> float:
    before = time.monotonic()
    command = ["gdb", "-batch", "-nx", "-ex", "thread apply all bt", str(program), str(core)]
    told = subprocess.run(command, check=True, capture_output=True).stdout
    assert b"crash_here" in told
    return time.monotonic() - before


if __name__ == "__main__":
    main()
