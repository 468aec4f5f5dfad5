"""How many handled signals were only counted: from the kernel's sums to what is new."""

from collections import OrderedDict
from dataclasses import dataclass

from crashbus.parts import Process
from services.detector.events import shortened
from services.detector.program import HANDLED_MAX, HandledKey

_MAX_COMMAND_LINE = 1024  # characters: thousands of processes are remembered


@dataclass(frozen=True)
class Count:
    """New handled signals of one process."""

    process: Process
    signal: int
    count: int


class Counts:
    """Remembers what was told before, and whose signals they are.

    Bounded like the kernel's own memory, whose keys it follows.
    """

    def __init__(self) -> None:
        self._told: dict[HandledKey, int] = {}
        self._processes: OrderedDict[tuple[int, int], Process] = OrderedDict()

    def saw(self, process: Process) -> None:
        """Remember a process whose handled signal was published."""
        key = (process.pid, process.start_ticks)
        self._processes[key] = shortened(process, _MAX_COMMAND_LINE)
        self._processes.move_to_end(key)
        while len(self._processes) > HANDLED_MAX:
            self._processes.popitem(last=False)

    def news(self, sums: dict[HandledKey, int]) -> tuple[list[Count], int]:
        """Return the new counts, and how many signals are of processes no longer known.

        Args:
            sums: what the kernel counted so far; it forgets who was quiet the longest.
        """
        found, unknown = [], 0
        for key, total in sums.items():
            told = self._told.get(key, 0)
            new = total - told if total >= told else total  # forgotten and begun anew
            process = self._processes.get((key.pid, key.start_boottime // 10_000_000))
            if new and process is None:
                unknown += new
            elif new and process is not None:
                found.append(Count(process, key.signal, new))
        self._told = sums
        return found, unknown
