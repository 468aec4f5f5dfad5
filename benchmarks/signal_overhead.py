"""What the detector costs a process that handles signals as its normal work.

One program faults and recovers many times, by turns with and without the detector in place;
the least time of each counts. Needs root::

    .venv/bin/python -m benchmarks.signal_overhead [faults]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from services.common.outbox import Outbox
from services.detector.detector import Detector
from services.detector.settings import DetectorSettings
from tests.support.crashers import crasher

ROUNDS = 5


def main() -> None:
    faults = int(sys.argv[1]) if len(sys.argv) > 1 else 300_000
    without, with_it = [], []
    for _ in range(ROUNDS):
        without.append(nanoseconds_per_fault(faults))
        with tempfile.TemporaryDirectory() as directory:
            outbox = Outbox(Path(directory) / "outbox.sqlite", 1000, 10**6)
            detector = Detector(DetectorSettings(), "benchmark", outbox, lambda: None)
            detector.start()
            with_it.append(nanoseconds_per_fault(faults))
            detector.stop(5)
            outbox.close()
    off, on = min(without), min(with_it)
    print(f"handled SIGSEGV, least of {ROUNDS} rounds of {faults}:")
    print(f"  without the detector {off:8.0f} ns")
    print(f"  with the detector    {on:8.0f} ns")
    print(f"  overhead             {on - off:8.0f} ns, ratio {on / off:.3f}")


def nanoseconds_per_fault(faults: int) -> float:
    before = time.perf_counter_ns()
    subprocess.run([crasher("handled"), str(faults)], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter_ns() - before) / faults


if __name__ == "__main__":
    main()
