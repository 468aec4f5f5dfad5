"""The kernel's log, as far as the kernel itself wrote it."""

import os
from pathlib import Path

from crashbus import names

KERNEL_LOG = Path("/dev/kmsg")
_MAX_RECORD = 8192  # bytes, Documentation/ABI/testing/dev-kmsg


def lines() -> list[tuple[float, str]]:
    """Read the log: time in seconds and text of each line that the kernel itself wrote.

    ``<priority and facility>,<sequence>,<microseconds>,<flags>;<text>``, dev-kmsg.
    """
    found: list[tuple[float, str]] = []
    try:
        log = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        while True:
            try:
                record = os.read(log, _MAX_RECORD)
            except BrokenPipeError:
                continue  # the oldest were overwritten meanwhile
            except OSError:
                return found
            head, _, text = record.partition(b";")
            fields = head.split(b",")
            # Whoever writes to the log from outside the kernel has another facility, syslog(3).
            if len(fields) >= 3 and int(fields[0]) >> 3 == 0:
                found.append((int(fields[2]) / 1e6, names.text(text.partition(b"\n")[0])))
    finally:
        os.close(log)
