"""What goes first when crash files have too little room: decided without I/O.

What every destination has confirmed goes before anything that is still waited for. Of the rest,
cores and binaries go before small files, and of each of these the oldest of the noisiest
executable: of a crash loop the first crash says as much as the hundredth, and of a rare one there
is no other.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum


class Loss(IntEnum):
    """What is lost with a file, least first."""

    NOTHING = 0  # delivered everywhere
    COPY = 1  # all its chunks are on the bus, and go on to be delivered from there
    LARGE = 2  # a core or a binary
    SMALL = 3


@dataclass(frozen=True)
class Candidate:
    """A crash file, or a whole crash that is delivered, that may be removed.

    Attributes:
        name: of the file; empty: all files of the crash.
        executable: of the process that crashed.
        since: when it crashed or was delivered, in Unix seconds.
        size: bytes that it takes on the disk.
    """

    crash_id: str
    name: str
    executable: str
    since: float
    size: int
    loss: Loss


def to_remove(candidates: Iterable[Candidate], excess: int) -> Iterator[Candidate]:
    """Give the candidates to remove, in order, until `excess` bytes are made free."""
    left = list(candidates)
    crashes = Counter(executable for _, executable in {(c.crash_id, c.executable) for c in left})
    gone: set[str] = set()
    while excess > 0 and left:
        first = min(left, key=lambda one: (one.loss, _calm(one, crashes), one.since, one.name))
        left.remove(first)
        if first.crash_id not in gone:
            gone.add(first.crash_id)
            crashes[first.executable] -= 1
        excess -= first.size
        yield first


def _calm(one: Candidate, crashes: Counter[str]) -> int:
    return 0 if one.loss is Loss.NOTHING else -crashes[one.executable]


def excess(used: int, limit: int) -> int:
    """Return how many bytes of those used are above a limit; a limit of 0 is none."""
    return max(0, used - limit) if limit else 0


def excess_on_disk(size: int, free: int, reserve: float) -> int:
    """Return how many bytes of a disk are to be made free.

    Args:
        reserve: percent of its size that shall be.
    """
    return max(0, int(size * reserve / 100) - free)
