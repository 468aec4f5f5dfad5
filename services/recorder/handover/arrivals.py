"""The crashes that wait to be captured: whoever captures them accepts them, too.

To hand a crash from the thread that accepts to one that captures takes a wake-up, some tenths of a
millisecond for which its process is held. So who has nothing to do waits at the socket itself; the
listener's own thread accepts only while all are busy.
"""

import queue
import threading
from collections.abc import Callable

import structlog

from services.recorder.handover.hold import Hold

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Arrivals(queue.Queue[Hold]):
    """Gives crashes to the threads that capture."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._accept: Callable[[], Hold] | None = None
        self._idle = 0  # threads that wait at the socket
        self._all_busy = threading.Condition(self.mutex)

    def accept_with(self, accept: Callable[[], Hold]) -> None:
        """Have who is idle accept; before there is anybody.

        Args:
            accept: waits for a crash; whatever it raises ends the wait.
        """
        self._accept = accept

    def stop_accepting(self) -> None:
        """Have nobody begin to wait at the socket any more; who does is still to be woken."""
        with self.mutex:
            self._accept = None
            self._all_busy.notify_all()

    def wait_until_all_are_busy(self) -> None:
        """Wait while somebody else would accept."""
        with self._all_busy:
            self._all_busy.wait_for(lambda: self._accept is None or not self._idle)

    def wait_until_nobody_waits(self) -> None:
        """Wait until nobody is at the socket, whom its end has woken."""
        with self._all_busy:
            self._all_busy.wait_for(lambda: not self._idle)

    def add(self, accept: Callable[[], Hold | None]) -> bool:
        """Add a crash, if one is there and nobody else accepts it; tell whether.

        Args:
            accept: does not wait.
        """
        with self.not_full:
            self.not_full.wait_for(lambda: self._qsize() < self.maxsize)
            # Whoever becomes idle from here on looks into the queue first.
            hold = None if self._idle else accept()
            if hold is None:
                return False
            self._put(hold)
            self.unfinished_tasks += 1
            self.not_empty.notify()
            return True

    def get(self, block: bool = True, timeout: float | None = None) -> Hold:
        """Wait for a crash, at the socket if that can be, for as long as it takes."""
        if not block or timeout is not None:
            return super().get(block, timeout)
        with self.mutex:
            if self._qsize():
                self.not_full.notify()
                return self._get()
            accept = self._accept
            self._idle += accept is not None
        hold = self._accepted(accept) if accept is not None else None
        return super().get() if hold is None else hold

    def _accepted(self, accept: Callable[[], Hold]) -> Hold | None:
        """Wait at the socket; None where that cannot be."""
        hold = None
        try:
            hold = accept()
        except (OSError, MemoryError):  # of which the listener tells, when it is its turn
            pass
        except Exception:
            log.error("a crash could not be accepted: the listener does", exc_info=True)
        finally:
            self._end_wait(hold)
        return hold

    def _end_wait(self, hold: Hold | None) -> None:
        with self.mutex:
            self._idle -= 1
            self.unfinished_tasks += hold is not None
            if not self._idle:
                self._all_busy.notify_all()
