"""Processes: which one a set of files belongs to, and waiting for one to end."""

import asyncio
import os
import time
from collections.abc import Sequence

from crashbus import identity
from crashbus.messages import Process, SignalEvent
from services.common.process import read_process

# AppScope takes the epoch of a set, in whole seconds, when its handler runs.
EVENT_BEFORE = 2.0  # seconds an event's time may lie before the set's epoch
EVENT_AFTER = 3.0


async def gone(pid: int, start_ticks: int) -> None:
    """Return when a process has ended; at once if it has, or if its PID was given again."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        if not is_alive(pid, start_ticks):
            return
        # A pidfd is readable once the process has ended, pidfd_open(2).
        loop.add_reader(descriptor, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def is_alive(pid: int, start_ticks: int) -> bool:
    """Tell whether this very process still exists."""
    try:
        return identity.start_ticks(pid) == start_ticks
    except ProcessLookupError:
        return False


def writer_of(pid: int, epoch: int, boot_id: str) -> Process | None:
    """Return the living process with this PID, if it was there when the set was made."""
    try:
        process = read_process(pid, boot_id)
    except ProcessLookupError:
        return None
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    started = time.time() - uptime + process.start_ticks / os.sysconf("SC_CLK_TCK")
    return process if started <= epoch + 1 else None


def from_events(pid: int, epoch: int, events: Sequence[SignalEvent]) -> Process | None:
    """Return the process that the detector saw take a signal when the set was made.

    Args:
        pid: the directory's name, so a PID in the process's own namespace.
    """
    for event in events:
        near = epoch - EVENT_BEFORE <= event.time <= epoch + 1 + EVENT_AFTER
        if near and event.process.ns_pid == pid:
            return event.process
    return None


def unknown(pid: int, epoch: int, uid: int, comm: str, boot_id: str) -> Process:
    """Return what stands for a process that was gone before anyone saw it.

    Its start is not known; the epoch of its files stands there, so that it is told apart.
    """
    return Process(
        boot_id=boot_id, pid=pid, ns_pid=pid, start_ticks=epoch, uid=uid, gid=0, comm=comm
    )
