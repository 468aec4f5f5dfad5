"""``python -m services.recorder.guard``: does with core_pattern what the recorder no longer can.

On a host the watchdog of a killed recorder leaves it to the pipe helper, or puts it back. In a
container the watchdog is ended together with the recorder. So this runs in a container of its own,
which is stopped after the recorder's, and puts core_pattern back at the latest then. It also frees
whom a recorder holds that is paused, see `paused`.
"""

import signal
import sys
import threading
from pathlib import Path

import structlog

from services.common import log as logs
from services.common.bus_settings import BusSettings
from services.common.settings import SettingsError
from services.recorder import core_pattern, hardening, pattern_file, paused
from services.recorder.errors import RecorderError
from services.recorder.pattern_file import LOCK_WITHIN
from services.recorder.settings import RecorderSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# Seconds that are believed of a recorder's patience: what its settings may make of it.
_LEAST, _MOST = paused.HELPER_WITHIN, 4 * 3600
LOOK_EVERY = 1.0  # seconds, in which a container engine has started it again, or has not


def main() -> None:
    """Watch over core_pattern until SIGTERM, and put it back last of all."""
    hardening.never_dump_core()
    try:
        settings, socket = BusSettings.load(), RecorderSettings.load().socket
    except SettingsError as error:
        sys.exit(f"crashbus guard: {error}")
    logs.configure(settings.log_level, settings.log_format, "guard")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log.info("guarding core_pattern", now=pattern_file.current())
    recorder = paused.Paused(patience)
    while not stop.wait(LOOK_EVERY):
        if put_back(settings.state) and (freed := recorder.look()):
            log.error("the recorder is paused; whom it held was killed", processes=freed)
    put_back(settings.state, last=socket)


def patience() -> int | None:
    """Return how many looks the recorder asks for; None: it gives no signs of life."""
    told = pattern_file.told_patience()
    return None if told is None else round(max(_LEAST, min(_MOST, told)) / LOOK_EVERY)


def put_back(state: Path, last: Path | None = None) -> bool:
    """Put core_pattern back unless a recorder runs, or the pipe helper keeps crashes for the next.

    Args:
        last: do so even then, and remove the helper, and the socket that a killed recorder has
            left here.

    Returns:
        Whether a recorder runs.
    """
    try:
        with core_pattern.only_one(within=LOCK_WITHIN if last else 0):
            if last or not core_pattern.leave_to_helper(state):
                core_pattern.restore(state)
            if last:
                core_pattern.remove_helper(state)
                last.unlink(missing_ok=True)
    except core_pattern.AnotherRuns:
        if last:
            log.warning("a recorder still runs, core_pattern stays its own")
        return True
    except (RecorderError, OSError) as error:
        log.error("core_pattern cannot be put back", error=str(error))
    return False


if __name__ == "__main__":
    main()
