"""Frees whom a recorder holds that is paused together with its watchdogs.

An engine pauses a container with all that is in it (`docker pause`), so whom the recorder has in
hand would be held until it goes on. The guard's container is another one.
"""

import os
import signal
from contextlib import suppress

from services.recorder import pattern_file, watchdog

# Looks without a sign of life, one a second: a recorder that is well can be late.
SILENT_AFTER = 5


class Paused:
    """What the guard sees of a recorder that runs.

    No clock is asked: after the whole host stood still, a recorder has all its time to wake up.

    Args:
        patience: looks until whoever is held is freed. By then watchdogs that are not paused have
            ended the recorder, and the pipe helper has kept what it could not hand over.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._beat: int | None = None
        self._silent = 0
        self._held: list[int] = []  # pidfds

    def look(self) -> int:
        """Look whether it gave a sign of life; return how many were freed of it."""
        beat = pattern_file.last_beat()
        self._silent = self._silent + 1 if beat == self._beat else 0
        self._beat = beat
        if self._silent < SILENT_AFTER:
            self._forget()
            return 0
        since = self._silent - SILENT_AFTER
        freed = self._free() if since and since % self._patience == 0 else 0
        if since % self._patience == 0:
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
