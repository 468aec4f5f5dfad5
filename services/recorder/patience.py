"""Sees to it that no process is held for too long, whatever the threads do that capture it."""

import queue
import time
from collections.abc import Callable

import structlog

from crashbus.identity import boot_id, crash_id, start_ticks
from services.recorder import metrics
from services.recorder.errors import CaptureFailed
from services.recorder.handover import arrival
from services.recorder.handover.arrival import KeptByHelper
from services.recorder.handover.hold import Hold
from services.recorder.handover.mechanism import Mechanism
from services.recorder.settings import RecorderSettings
from services.recorder.workers import Workers

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_BEFORE_THE_HELPER = 45.0  # seconds; it waits for TURN, see helper/corepipe.c


class Patience:
    """Lets go of processes whose capture, or the wait for it, takes too long.

    Args:
        arrivals: crashes that wait for a capture thread.
        captures: the threads.
        on_failure: told of each that is let go before anything was captured.
    """

    def __init__(
        self,
        settings: RecorderSettings,
        mechanism: Mechanism,
        arrivals: "queue.Queue[Hold]",
        captures: Workers[Hold],
        on_failure: Callable[[CaptureFailed], None],
    ) -> None:
        self._settings = settings
        self._mechanism = mechanism
        self._arrivals = arrivals
        self._captures = captures
        self._on_failure = on_failure
        self._boot_id = boot_id()

    def let_go_of_stalled(self) -> None:
        """Let go of what is in work and stands still, or will not end.

        The first is a reader that waits for a dead disk, the second a process that reserved
        more memory than anybody could read.
        """
        now, patience = time.monotonic(), self._settings.stall_deadline
        for hold in (one for one in self._captures.in_work() if one.is_held):
            if now - hold.last_progress > patience + 1:  # its own reading gives up first
                _let_go(hold, f"its capture stood still for {patience:.0f} s")
            elif hold.age > self._settings.hold_deadline:
                _let_go(
                    hold,
                    f"it was not whole after {hold.age:.0f} s (CRASHBUS_RECORDER_HOLD_DEADLINE)",
                )

    def give_up_waiting(self) -> None:
        """Let go of who waited too long for a capture thread.

        A few system calls for each, and none that can hang: not a byte of its memory is read,
        no disk is written to.
        """
        patience = min(self._settings.stall_deadline, self._settings.hold_deadline)
        if self._mechanism is Mechanism.PIPE:  # or its helper decides, before it knows
            patience = min(patience, _BEFORE_THE_HELPER)
        for hold in waiting(self._arrivals):
            if hold.age > patience and self._withdraw(hold):
                self._give_up(hold, self._all_stand_still(patience))

    def _withdraw(self, hold: Hold) -> bool:
        """Take a hold out of the queue; False when a thread was faster."""
        with self._arrivals.mutex:
            try:
                self._arrivals.queue.remove(hold)
            except ValueError:
                return False
            self._arrivals.not_full.notify()
            return True

    def _all_stand_still(self, patience: float) -> bool:
        """Tell whether it is no crowd that is waited for, but a dead disk."""
        since = time.monotonic() - patience / 2
        working = (hold for hold in self._captures.in_work() if not hold.waits)
        return all(hold.last_progress < since for hold in working)

    def _give_up(self, hold: Hold, all_stand_still: bool) -> None:
        # On a dead disk its helper could not keep it either, and would never end.
        if self._mechanism is Mechanism.PIPE and not all_stand_still:
            log.warning("a crash waited too long, its pipe helper keeps it")
            hold.close()
            self._arrivals.task_done()
            return
        failure = CaptureFailed(
            "capture_failed",
            f"it waited {hold.age:.0f} s for a capture thread and was let go",
            "see why captures take so long (disk, size of cores), or raise "
            "CRASHBUS_RECORDER_CAPTURES or CRASHBUS_RECORDER_STALL_DEADLINE",
        )
        try:
            pid = arrival.identify(self._mechanism, hold)
            failure.crash_id = crash_id(self._boot_id, pid, start_ticks(pid))
        except (KeptByHelper, CaptureFailed, OSError) as error:
            log.warning("who waited cannot be named", error=str(error))
        finally:
            _let_go(hold, "it waited too long")
            hold.close()
            metrics.CAPTURES.labels("failed").inc()
            self._on_failure(failure)
            self._arrivals.task_done()


def waiting(arrivals: "queue.Queue[Hold]") -> list[Hold]:
    """Return what is in the queue."""
    with arrivals.mutex:
        return list(arrivals.queue)


def _let_go(hold: Hold, because: str) -> None:
    hold.let_go(because)
    metrics.LET_GO.inc()
    log.error("let a process go", because=because)
