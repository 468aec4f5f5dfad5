"""The kernel's log, as far as the kernel itself wrote it."""

import ctypes
import os
import re
import time
from functools import cache
from pathlib import Path

import structlog

from crashbus import names

log: structlog.stdlib.BoundLogger = structlog.get_logger()

KERNEL_LOG = Path("/dev/kmsg")
_MAX_RECORD = 8192  # bytes, Documentation/ABI/testing/dev-kmsg
_AROUND = 10.0  # seconds between an event and what the log says of it
# adjtimex(2) corrects CLOCK_MONOTONIC by that much at most; CLOCK_MONOTONIC_RAW it leaves alone.
_DRIFT = 500e-6
_READ_ALL, _SIZE = 3, 10  # syslog(2)
# The kernel's own lines, of facility 0, where it writes times; who wrote it may stand behind that.
_LINE = re.compile(rb"<[0-7]>\[ *(\d+\.\d+)\](?:\[ *[TC]\d+\])? (.*)")


def is_near(when: float, at: float) -> bool:
    """Tell whether a line may be of an event.

    The log's clock goes as the processor's does, which CLOCK_MONOTONIC_RAW shows, or as
    CLOCK_MONOTONIC where that one is not steady; local_clock(), kernel/sched/clock.c. In months
    these come to be minutes apart.

    Args:
        when: what `lines` says of the line.
        at: CLOCK_MONOTONIC of the event, in seconds.
    """
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    ahead = now - time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
    within = _AROUND + max(0.0, now - at) * _DRIFT  # of that since the event nobody knows
    return min(abs(when - at), abs(when - (at - ahead))) <= within


def lines() -> list[tuple[float, str]]:
    """Read the log: time in seconds and text of each line that the kernel itself wrote."""
    try:
        device = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return _by_call(str(error))
    try:
        return _from_device(device)
    finally:
        os.close(device)


def _from_device(device: int) -> list[tuple[float, str]]:
    """``<priority and facility>,<sequence>,<microseconds>,<flags>;<text>``, dev-kmsg."""
    found: list[tuple[float, str]] = []
    while True:
        try:
            record = os.read(device, _MAX_RECORD)
        except BrokenPipeError:
            continue  # the oldest were overwritten meanwhile
        except OSError:
            return found
        head, _, text = record.partition(b";")
        fields = head.split(b",")
        # Whoever writes to the log from outside the kernel has another facility, syslog(3).
        if len(fields) >= 3 and int(fields[0]) >> 3 == 0:
            found.append((int(fields[2]) / 1e6, names.text(text.partition(b"\n")[0])))


def _by_call(fault: str) -> list[tuple[float, str]]:
    """Read it where there is no device, as in a pod of Kubernetes; syslog(2).

    A name with a line feed in it makes two lines here, where the device shows it as ``\\x0a``.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(max(1, libc.klogctl(_SIZE, None, 0)))
    read = libc.klogctl(_READ_ALL, buffer, len(buffer))
    if read < 0:
        _tell(fault, os.strerror(ctypes.get_errno()))
        return []
    found = (_LINE.fullmatch(line) for line in buffer.raw[:read].split(b"\n"))
    return [(float(one[1]), names.text(one[2])) for one in found if one]


@cache  # once: it stays so
def _tell(device: str, call: str) -> None:
    log.warning(
        "the kernel's log cannot be read: why the OOM killer chose a process is not told",
        device=device,
        syslog=call,
        mend="give the collector CAP_SYSLOG",
    )
