"""Processes: which one a set of files belongs to, and waiting for one to end."""

import asyncio
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence, Set
from functools import cached_property
from operator import attrgetter
from pathlib import Path

from crashbus import identity
from crashbus.messages import SignalEvent
from crashbus.parts import Process
from services.collector import spool
from services.common.process import read_process

# AppScope takes the epoch of a set, in whole seconds, when its handler runs.
EVENT_BEFORE = 2.0  # seconds an event's time may lie before the set's epoch
EVENT_AFTER = 3.0
LONGEST = 120.0  # seconds; of sets whose events are looked up together
LOOK_AGAIN = 0.5  # seconds, where a process cannot be waited for


async def gone(pid: int, start_ticks: int) -> None:
    """Return when a process has ended; at once if it has, or if its PID was given again."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # it is gone, or we have no descriptor left
        while is_alive(pid, start_ticks):
            await asyncio.sleep(LOOK_AGAIN)
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
    """Tell whether this very process can still do anything; a zombie cannot."""
    try:
        return identity.start_ticks(pid) == start_ticks and not _is_zombie(pid)
    except ProcessLookupError:
        return False


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
    return stat[stat.rindex(b")") + 2 :][:1] in (b"Z", b"X")  # proc_pid_stat(5), field 3


class Living:
    """The living process with a PID, read once: thousands of sets may lie in its directory."""

    def __init__(self, pid: int, boot_id: str) -> None:
        self._pid = pid
        self._boot_id = boot_id

    def writer_of(self, epoch: int, owner: int) -> Process | None:
        """Return the process, if it wrote a set into the directory of its PID.

        The PID is one of the writer's own namespace. Only where that is the host's does it name
        the writer, so that must be so, and the process must own the set and be older than it.
        """
        process = self._process
        if process is None or process.uid != owner:
            return None
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
        started = time.time() - uptime + process.start_ticks / os.sysconf("SC_CLK_TCK")
        return process if started <= epoch + 1 else None

    @cached_property
    def _process(self) -> Process | None:
        try:
            process = read_process(self._pid, self._boot_id)
        except ProcessLookupError:
            return None
        return None if process.ns_pid != self._pid or _is_zombie(self._pid) else process

    @cached_property
    def open_files(self) -> Set[tuple[int, int]]:
        """Device and inode of each file that it has open."""
        return spool.open_by_process(self._pid)


def event_times(epochs: Iterable[int]) -> list[tuple[float, float]]:
    """Return from when to when the events of sets may be, the newest first.

    Sets that lie close together have one time, as long as that is not too long: of a long one the
    newest would be read last.
    """
    times: list[tuple[float, float]] = []
    for epoch in sorted(set(epochs), reverse=True):
        since, until = _event_time(epoch)
        if times and times[-1][0] <= until and times[-1][1] - since <= LONGEST:
            times[-1] = since, times[-1][1]
        else:
            times.append((since, until))
    return times


def _event_time(epoch: int) -> tuple[float, float]:
    return epoch - EVENT_BEFORE, epoch + 1 + EVENT_AFTER


def from_events(pid: int, epoch: int, owner: int, events: Sequence[SignalEvent]) -> Process | None:
    """Return the process that the detector saw take a signal when the set was made.

    Args:
        pid: the directory's name, so a PID in the process's own namespace.
        events: in the order of their times.
    """
    since, until = _event_time(epoch)
    for number in range(bisect_left(events, since, key=attrgetter("time")), len(events)):
        event, process = events[number], events[number].process
        if event.time > until:
            break
        if (process.ns_pid, process.uid) == (pid, owner):
            return process
    return None


def unknown(pid: int, epoch: int, uid: int, comm: str, boot_id: str) -> Process:
    """Return what stands for a process that was gone before anyone saw it.

    Its start is not known; the epoch of its files stands there, so that it is told apart.
    """
    return Process(
        boot_id=boot_id, pid=pid, ns_pid=pid, start_ticks=epoch, uid=uid, gid=0, comm=comm
    )
