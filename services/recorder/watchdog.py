"""A process beside the recorder that sees to it that no crash waits for a recorder that is stuck.

The kernel holds a crashing process for as long as the recorder has its socket open, and a
recorder that is stopped (SIGSTOP, a debugger) or hangs has them open for ever. So the recorder
tells this process once a second that it works. When it falls silent it is killed, which closes
its sockets and frees everyone; whoever supervises it starts it again. When it is gone, however
that came, core_pattern is put back, because cores that go to a socket without a listener are
lost. Only a pipe helper stays: it keeps them for the next recorder, `orphans`.
"""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from services.recorder import hardening

_ENDS_WITHIN = 5.0  # seconds from SIGKILL to the end of the recorder


class Watchdog:
    """The recorder's side: starts the watchdog, tells it that all is well, and ends it.

    Args:
        state: the state directory, where core_pattern's former value is kept.
        patience: seconds without a beat after which the recorder is killed.
        log_form: ``text`` or ``json``.
    """

    def __init__(self, state: Path, patience: float, log_form: str) -> None:
        self._arguments = (str(state), str(patience), log_form)
        # Nothing is read from it by us: open, so that a beat without a watchdog is no SIGPIPE.
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it watches."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it.

        Raises:
            OSError: no process, or no descriptor, can be had.
        """
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
        """End it; core_pattern is the recorder's own business from here on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Watch over the recorder until it ends."""
    recorder, beats = int(sys.argv[1]), int(sys.argv[2])
    state, patience, log_form = Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
    hardening.never_dump_core()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Whoever stops all of a service's processes at once stops the recorder too.
        signal.signal(number, signal.SIG_IGN)
    fell_silent = not _ended(recorder, beats, patience)
    if fell_silent:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(recorder, signal.SIGKILL)
        _wait_for_end(recorder)
    _put_back(state, log_form, patience if fell_silent else None)


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


def _wait_for_end(recorder: int) -> None:
    waiting = select.poll()
    waiting.register(recorder, select.POLLIN)
    waiting.poll(_ENDS_WITHIN * 1000)


def _put_back(state: Path, log_form: str, silence: float | None) -> None:
    """Put core_pattern back, unless another recorder has taken over already."""
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
        with core_pattern.only_one():
            if core_pattern.keeps_crashes(state):
                log.warning("core_pattern stays: the pipe helper keeps crashes for a recorder")
            else:
                core_pattern.restore(state)
    except (RecorderError, OSError) as error:
        log.warning("core_pattern stays as it is", error=str(error))


if __name__ == "__main__":
    main()
