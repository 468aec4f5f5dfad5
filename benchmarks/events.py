"""How many signals a second become events until the first is lost.

One program handles signals at a rate that rises from row to row. Each signal becomes an event that
waits on disk for the bus; usually the repetitions would only be counted. The peer is a bare bcc
program that tells of each signal by a perf buffer of the same size, and a callback that only
counts. Needs root::

    .venv/bin/python -m benchmarks.events [--seconds N] [rate…]
"""

import argparse
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common import log as logs
from services.common.outbox import Outbox
from services.detector import metrics
from services.detector.detector import Detector
from services.detector.headers import kernel_source
from services.detector.settings import DetectorSettings
from tests.support.crashers import crasher

RATES = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)  # a second
SECONDS = 3.0

_PEER = """
BPF_PERF_OUTPUT(events);
struct event { u64 time; u32 pid; s32 signal; };
int on_signal(struct bpf_raw_tracepoint_args *args) {
    struct event event = {.time = bpf_ktime_get_ns(), .signal = args->args[0]};
    event.pid = bpf_get_current_pid_tgid() >> 32;
    if (event.signal != 11) return 0;
    events.perf_submit(args, &event, sizeof(event));
    return 0;
}
"""


@dataclass
class Seen:
    """What became of the signals of one row."""

    sent: int
    lost: int
    processor: float  # seconds of this process


Lost = Callable[[], int]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.events")
    parser.add_argument("rates", nargs="*", type=int, default=RATES, help="signals a second")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each rate")
    asked = parser.parse_args()
    logs.configure("critical", "text", "benchmark")
    first: dict[str, int | None] = {}
    print(f"{'':18}{'wanted/s':>8}{'sent/s':>9}{'lost':>9}{'us/event':>9}")
    for name, way in (("Crashbus", crashbus), ("bare perf buffer", perf_buffer)):
        first[name] = None
        for rate in asked.rates:
            with way() as lost:
                seen = measure(rate, asked.seconds, lost)
            cost = 1e6 * seen.processor / max(1, seen.sent - seen.lost)
            achieved = seen.sent / asked.seconds
            print(f"{name:18}{rate:>8}{achieved:>9.0f}{seen.lost:>9}{cost:>9.1f}", flush=True)
            if seen.lost:
                first[name] = rate
                break
    for name, lost_at in first.items():
        print(f"{name:18} first loses at {lost_at or 'none of these rates'}")


def measure(rate: int, seconds: float, lost: Lost) -> Seen:
    """Have a program send signals, and wait until all that were not lost are taken."""
    before = time.process_time()
    command = [str(crasher("paced")), str(rate), str(seconds)]
    sent = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return Seen(sent, lost(), time.process_time() - before)


@contextmanager
def crashbus() -> Iterator[Lost]:
    """The detector, as it is but for one thing: no handled signal is only counted."""
    settings = DetectorSettings().model_copy(update={"handled_quiet": 0})
    with tempfile.TemporaryDirectory(prefix="events-") as directory:
        outbox = Outbox(Path(directory) / "outbox.sqlite", 10_000_000, 1 << 33)
        detector = Detector(settings, "benchmark", outbox, lambda: None)
        detector.start()
        before = metrics.RING_LOST._value.get()

        def lost() -> int:
            detector.stop(120)  # stores all that was seen
            return int(metrics.RING_LOST._value.get() - before)

        try:
            yield lost
        finally:
            detector.stop(120)
            outbox.close()


@contextmanager
def perf_buffer() -> Iterator[Lost]:
    """The least that bcc can do for an event."""
    from bcc import BPF  # absent where Debian's python3-bpfcc is

    with kernel_source() as directory:
        os.environ["BCC_KERNEL_SOURCE"] = str(directory)
        program = BPF(text=_PEER)
        del os.environ["BCC_KERNEL_SOURCE"]
    lost = taken = 0

    def on_event(_cpu: int, _data: Any, _size: int) -> None:
        nonlocal taken
        taken += 1

    def on_lost(count: int) -> None:
        nonlocal lost
        lost += count

    pages = DetectorSettings().ring_pages // (os.cpu_count() or 1)
    pages = 1 << (pages.bit_length() - 1)
    program["events"].open_perf_buffer(on_event, page_cnt=pages, lost_cb=on_lost)
    program.attach_raw_tracepoint(tp="signal_deliver", fn_name="on_signal")
    stopping = threading.Event()

    def poll() -> None:
        while not stopping.is_set():
            program.perf_buffer_poll(100)
        program.perf_buffer_poll(0)

    polling = threading.Thread(target=poll)
    polling.start()

    def end() -> int:
        stopping.set()
        polling.join()
        return lost

    try:
        yield end
    finally:
        end()
        program.cleanup()


if __name__ == "__main__":
    main()
