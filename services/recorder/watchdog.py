"""A process beside the recorder that sees to it that no crash waits for a recorder that is stuck.

The kernel holds a crashing process for as long as the recorder has its socket open, and a
recorder that is stopped (SIGSTOP, a debugger) or hangs has them open for ever. So the recorder
tells this process once a second that it works. When it falls silent it is killed, which closes
its sockets and frees everyone; whoever supervises it starts it again. When it is gone, however
that came, core_pattern is left to the pipe helper, because cores that go to a socket without a
listener are lost: it keeps them for the next recorder, `orphans`. Where there is none, or the
recorder does not even die, core_pattern is put back.

There are two of them, the second more patient, so that a watchdog that is stopped together with
the recorder is no gap. Both leave the recorder's cgroup, because that can be frozen as a whole.
"""

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from services.recorder import hardening, pattern_file

if TYPE_CHECKING:  # it is the recorder's side alone that has one
    from services.recorder.handover.mechanism import Plan

_ENDS_WITHIN = 5.0  # seconds from SIGKILL to the end of the recorder
PATIENCES = 2  # times that of the first has the second
# Where a process leaves its cgroup to: the root of version 1's freezer, or of version 2.
_CGROUP_ROOTS = ("/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified", "/sys/fs/cgroup")


class Watchdogs:
    """Both of them; see `Watchdog`."""

    def __init__(self, state: Path, patience: float, log_form: str, plan: "Plan") -> None:
        self._both = tuple(
            Watchdog(state, seconds, log_form, plan) for seconds in (patience, patience * PATIENCES)
        )

    def start(self) -> None:
        """Start those that do not watch, and give each a first beat.

        Raises:
            OSError: no process, or no descriptor, can be had.
        """
        for one in self._both:
            if not one.is_watching:
                one.start()
                one.beat()

    @property
    def are_watching(self) -> bool:
        """Whether both watch."""
        return all(one.is_watching for one in self._both)

    def beat(self) -> None:
        """Say that the recorder works."""
        for one in self._both:
            one.beat()

    def stop(self) -> None:
        """End them; core_pattern is the recorder's own business from here on."""
        for one in self._both:
            one.stop()


class Watchdog:
    """The recorder's side: starts the watchdog, tells it that all is well, and ends it.

    Args:
        state: the state directory, where core_pattern's former value is kept.
        patience: seconds without a beat after which the recorder is killed.
        log_form: ``text`` or ``json``.
        plan: what the recorder makes of core_pattern.
    """

    def __init__(self, state: Path, patience: float, log_form: str, plan: "Plan") -> None:
        patterns = plan.pattern, plan.stand_in or ""
        self._arguments = (str(state), str(patience), log_form, *patterns)
        # Nothing is read from it by us: open, so that a beat without a watchdog is no SIGPIPE.
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._process: subprocess.Popen[bytes] | None = None
        # It reads each beat at once. What it leaves is as old as it has bytes, in seconds.
        self._unread = max(3, round(patience))

    @property
    def is_watching(self) -> bool:
        """Whether it runs, and is not stopped itself."""
        if self._process is None or self._process.poll() is not None:
            return False
        (unread,) = struct.unpack("i", fcntl.ioctl(self._read, termios.FIONREAD, bytes(4)))
        return bool(unread < self._unread)

    def start(self) -> None:
        """Start it, in the place of one that does not watch.

        Raises:
            OSError: no process, or no descriptor, can be had.
        """
        if self._process is not None:
            self._process.kill()  # a frozen one ends once it is thawed
        with suppress(BlockingIOError):
            os.read(self._read, 1 << 20)
        us = os.pidfd_open(os.getpid())
        try:
            self._process = subprocess.Popen(
                (
                    *(sys.executable, "-I", "-m", "services.recorder.watchdog"),
                    *(str(us), str(self._read), *self._arguments),
                ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(us, self._read),
                cwd="/",
                start_new_session=True,  # a signal to the recorder's group is not for it
            )
        finally:
            os.close(us)

    def beat(self) -> None:
        """Say that the recorder works."""
        with suppress(BlockingIOError):  # nobody reads: a new one finds enough to begin with
            os.write(self._write, b".")

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDS_WITHIN)


def main() -> None:
    """Watch over the recorder until it ends."""
    recorder, beats = int(sys.argv[1]), int(sys.argv[2])
    state, patience, log_form = Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
    pattern, stand_in = sys.argv[6], sys.argv[7] or None
    hardening.never_dump_core()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Whoever stops all of a service's processes at once stops the recorder too.
        signal.signal(number, signal.SIG_IGN)
    _leave_cgroup()
    fell_silent = not _ended(recorder, beats, patience)
    if fell_silent:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(recorder, signal.SIGKILL)
    held: list[int] = []
    if has_ended := _has_ended(recorder):
        _leave_to_helper(pattern, stand_in)
    else:
        held = dumping()
    _put_back(state, log_form, patience if fell_silent else None, has_ended)
    for process in held:
        # It waits for a recorder that cannot be ended: nothing but this ends it.
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)


def _ended(recorder: int, beats: int, patience: float) -> bool:
    """Wait for the recorder's end, or for its silence.

    No clock is asked: after the whole host stood still, a recorder has half its time to wake up.
    """
    waiting = select.poll()
    waiting.register(recorder, select.POLLIN)  # pidfd_open(2): readable once it has ended
    waiting.register(beats, select.POLLIN)
    silent = 0
    while silent < 2:
        ready = dict(waiting.poll(patience / 2 * 1000))
        if recorder in ready:
            return True
        silent = 0 if ready else silent + 1
        if beats in ready and not os.read(beats, 4096):
            waiting.unregister(beats)  # it is ending
    return False


def _leave_cgroup() -> None:
    """Go to the root of the cgroups, where that is possible: what is frozen there is the host."""
    for root in _CGROUP_ROOTS:
        with suppress(OSError):
            procs = os.open(f"{root}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(procs, b"0")  # whoever writes, cgroups(7)
            finally:
                os.close(procs)


def _has_ended(recorder: int) -> bool:
    """Wait for its end; False where it does not die of SIGKILL.

    That is so in a frozen cgroup of version 1, or while it waits for a disk.
    """
    waiting = select.poll()
    waiting.register(recorder, select.POLLIN)
    return bool(waiting.poll(_ENDS_WITHIN * 1000))


def _leave_to_helper(pattern: str, stand_in: str | None) -> None:
    """Have the pipe helper keep crashes, before anything else: until then each is lost."""
    with suppress(OSError), pattern_file.locked():  # `_put_back` finds the same, and says so
        pattern_file.leave_to_helper(pattern, stand_in)


def dumping() -> list[int]:
    """Return pidfds of all processes that dump core now; proc_pid_status(5).

    All of the host's cores go one way, so all of them wait for that recorder.
    """
    found = []
    for place in Path("/proc").iterdir():
        if not place.name.isdecimal():
            continue
        with suppress(OSError):
            process, dumps = os.pidfd_open(int(place.name)), False
            try:
                dumps = b"\nCoreDumping:\t1\n" in (place / "status").read_bytes()
            finally:  # it may have ended just now
                found.append(process) if dumps else os.close(process)
    return found


def _put_back(state: Path, log_form: str, silence: float | None, has_ended: bool) -> None:
    """Put core_pattern back, unless a helper keeps crashes or another recorder has taken over.

    Args:
        silence: seconds after which the recorder was killed; None: it ended by itself.
        has_ended: if not, it holds the lock of `core_pattern` for good, and nobody else will.
    """
    # Loaded only now: until then this process needs a quarter of the memory, and what is held
    # is free by now even if the disk that these lie on is the reason for it all.
    import structlog

    from services.common import log as logs
    from services.recorder import core_pattern
    from services.recorder.errors import RecorderError

    logs.configure("info", log_form, "recorder-watchdog")
    log = structlog.get_logger()
    if silence is not None:
        log.error("killed a recorder that did not work any more", silent_for=f"{silence:g} s")
    try:
        with core_pattern.only_one() if has_ended else nullcontext():
            if core_pattern.keeps_crashes(state):
                log.warning("the pipe helper keeps crashes for the next recorder")
            else:
                core_pattern.restore(state)
    except (RecorderError, OSError) as error:
        log.warning("core_pattern stays as it is", error=str(error))


if __name__ == "__main__":
    main()
