"""Frees whom a recorder holds that is paused together with its watchdogs.

An engine pauses a container with all that is in it (`docker pause`), so whom the recorder has in
hand would be held until it goes on. The guard's container is another one.
"""

import os
import signal
from collections.abc import Callable
from contextlib import suppress

from services.recorder import pattern_file, watchdog
from services.recorder.settings import RecorderSettings

HELPER_WITHIN = 70.0  # seconds that the pipe helper asks for a recorder, and then keeps a crash
# Looks without a sign of life, one a second: a recorder that is well can be late.
SILENT_AFTER = 5


def patience_of(settings: RecorderSettings) -> float:
    """Return the seconds until everyone but a paused recorder has let go of a crashed process.

    By then watchdogs that are not paused have ended it, the pipe helper has kept what it could not
    hand over, and a former handler is done.
    """
    of_watchdogs = watchdog.PATIENCES * settings.watchdog_deadline
    return of_watchdogs + HELPER_WITHIN + settings.chain_deadline


class Paused:
    """What the guard sees of a recorder that runs.

    No clock is asked: after the whole host stood still, a recorder has all its time to wake up.

    Args:
        patience: tells after how many looks whoever is held is freed; None: this recorder gives no
            signs of life.
    """

    def __init__(self, patience: Callable[[], int | None]) -> None:
        self._patience = patience
        self._beat: int | None = None
        self._silent = 0
        self._held: list[int] = []  # pidfds

    def look(self) -> int:
        """Look whether it gave a sign of life; return how many were freed of it."""
        beat = pattern_file.last_beat()
        self._silent = self._silent + 1 if beat == self._beat else 0
        self._beat = beat
        if self._silent < SILENT_AFTER or not (patience := self._patience()):
            self._forget()
            return 0
        since = self._silent - SILENT_AFTER
        freed = self._free() if since and since % patience == 0 else 0
        if since % patience == 0:
            self._held = watchdog.dumping()
        return freed

    def _free(self) -> int:
        freed = 0
        for process in self._held:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                freed += 1
        self._forget()
        return freed

    def _forget(self) -> None:
        for process in self._held:
            os.close(process)
        self._held = []
