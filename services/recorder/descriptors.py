"""How the recorder's descriptors are shared out, so that each crash that it takes finds its own.

A crash that finds none is lost, while one that is not accepted yet waits, held, in the socket's
backlog. So with few descriptors less is done at once.
"""

from dataclasses import dataclass
from typing import Self

from services.recorder.conditions import MODULE_FILES

_OURS = 64  # sockets, pipes, workers, and what is open for a moment
_ACCEPTED = 1024
_UNFINISHED = 256
_CHAINED = 64
_WAITING = 32
_CHAINED_AT_ONCE = 16  # systemd allows its own handler as many


@dataclass(frozen=True)
class Shares:
    """How many crashes may be where at a time.

    Attributes:
        captures: captured at once, of 8 descriptors each.
        waiting: for the turn of their core, of 8 each; beyond, they keep their stacks.
        accepted: that wait for a capture thread, of one; beyond, they wait in the backlog.
        unfinished: that wait for their backtrace, of 3; beyond, they get none.
        with_modules: of these, and of the captured, that have their modules open.
        chained: that wait for a former handler, of 4; beyond, none is started.
        chained_at_once: whose former handler runs.
    """

    captures: int
    waiting: int
    accepted: int
    unfinished: int
    with_modules: int
    chained: int
    chained_at_once: int

    @classmethod
    def of(cls, descriptors: int, captures: int) -> Self:
        """Share out so many descriptors.

        Args:
            captures: wanted at once.
        """
        left = max(64, descriptors - _OURS)
        return cls(
            captures=min(captures, max(1, left // 60)),
            waiting=min(_WAITING, left // 160),
            accepted=min(_ACCEPTED, left // 10),
            unfinished=min(_UNFINISHED, left // 16),
            with_modules=left * 3 // 8 // MODULE_FILES,
            chained=min(_CHAINED, left // 32),
            chained_at_once=min(_CHAINED_AT_ONCE, max(1, left // 64)),
        )
