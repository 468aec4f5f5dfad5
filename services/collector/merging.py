"""What the sets of one crash tell together, in whatever order they are found.

AppScope's library writes one for the signal that it handles; of the abort() that this ends in the
recorder makes another. No I/O.
"""

from crashbus.parts import Process
from services.collector.ledger import Crash

# Seconds; AppScope writes its core, at worst 200 MiB a second, waits for two, and calls abort().
SAME_SIGNAL = 300.0
_SIGNAL = ("signal", "signal_name", "signal_at", "code", "code_meaning", "fault_address")


def merge(crash: Crash, told: Crash) -> None:
    """Add to a crash what another of its sets tells.

    When it was, and of which name, stays as it is: what was delivered already lies in a folder
    that is named after that.
    """
    if told.signal and (not crash.signal or _tells_more(told, crash)):
        for name in _SIGNAL:
            setattr(crash, name, getattr(told, name))
    crash.signal_recorded |= told.signal_recorded
    fullest = max(crash.process, told.process, key=_fullness)
    crash.process = fullest.model_copy(update={"comm": crash.process.comm})
    crash.fingerprint = told.fingerprint or crash.fingerprint
    crash.build_fingerprint = told.build_fingerprint or crash.build_fingerprint
    crash.modules = told.modules or crash.modules
    crash.notes.extend(note for note in told.notes if note not in crash.notes)


def _tells_more(told: Crash, crash: Crash) -> bool:
    """Tell whose signal is what happened: the earlier one of two close together, for the later
    came of it. Of others the process recovered, or somebody gave files their time.
    """
    if not crash.signal_at:  # entered by a former version, which asked no more either
        return False
    if abs(told.signal_at - crash.signal_at) <= SAME_SIGNAL:
        return told.signal_at < crash.signal_at
    return (told.signal_recorded, told.signal_at) > (crash.signal_recorded, crash.signal_at)


def _fullness(process: Process) -> tuple[bool, int]:
    """Rank what is told of one process: the recorder alone asks its container's runtime, and some
    others saw it only when it was as good as gone.
    """
    container = process.container
    return bool(container and container.name), len(process.model_dump_json())
