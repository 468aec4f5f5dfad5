"""``python -m services.recorder.guard``: puts core_pattern back when the recorder is gone.

On a host its watchdog does so. In a container the watchdog is ended together with the recorder,
and cores would go to a socket without a listener until somebody starts it again. So this runs in
a container of its own, which is stopped after the recorder's.
"""

import signal
import sys
import threading
from pathlib import Path

import structlog

from services.common import log as logs
from services.common.bus_settings import BusSettings
from services.common.settings import SettingsError
from services.recorder import core_pattern
from services.recorder.errors import RecorderError
from services.recorder.settings import RecorderSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_EVERY = 1.0  # seconds, in which a container engine has started it again, or has not


def main() -> None:
    """Watch over core_pattern until SIGTERM, and put it back last of all."""
    try:
        settings, socket = BusSettings.load(), RecorderSettings.load().socket
    except SettingsError as error:
        sys.exit(f"crashbus guard: {error}")
    logs.configure(settings.log_level, settings.log_format, "guard")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log.info("guarding core_pattern", now=core_pattern.current())
    while not stop.wait(LOOK_EVERY):
        put_back(settings.state)
    put_back(settings.state, last=socket)


def put_back(state: Path, last: Path | None = None) -> None:
    """Put core_pattern back unless a recorder runs.

    Args:
        last: do so even if the pipe helper would keep crashes until a recorder is back, and
            remove the socket that a killed one has left here.
    """
    try:
        with core_pattern.only_one(within=core_pattern.LOCK_WITHIN if last else 0):
            if last or not core_pattern.keeps_crashes(state):
                core_pattern.restore(state)
            if last:
                last.unlink(missing_ok=True)
    except core_pattern.AnotherRuns:
        if last:
            log.warning("a recorder still runs, core_pattern stays its own")
    except (RecorderError, OSError) as error:
        log.error("core_pattern cannot be put back", error=str(error))


if __name__ == "__main__":
    main()
