"""What the sets of one crash tell together, in whatever order they are found.

AppScope's library writes one for the signal that it handles; of the abort() that this ends in the
recorder makes another. No I/O.
"""

from crashbus.parts import Process
from services.collector.ledger import Crash

_SIGNAL = ("signal", "signal_name", "signal_at", "code", "code_meaning", "fault_address")


def merge(crash: Crash, told: Crash) -> None:
    """Add to a crash what another of its sets tells.

    What happened is what the earliest signal was. When, and to which name, stays as it is: what
    was delivered already lies in a folder that is named after that.
    """
    if told.signal and (not crash.signal or told.signal_at < crash.signal_at):
        for name in _SIGNAL:
            setattr(crash, name, getattr(told, name))
    fullest = max(crash.process, told.process, key=_fullness)
    crash.process = fullest.model_copy(update={"comm": crash.process.comm})
    crash.fingerprint = told.fingerprint or crash.fingerprint
    crash.build_fingerprint = told.build_fingerprint or crash.build_fingerprint
    crash.modules = told.modules or crash.modules
    crash.notes.extend(note for note in told.notes if note not in crash.notes)


def _fullness(process: Process) -> tuple[bool, int]:
    """Rank what is told of one process: the recorder alone asks its container's runtime, and some
    others saw it only when it was as good as gone.
    """
    container = process.container
    return bool(container and container.name), len(process.model_dump_json())
