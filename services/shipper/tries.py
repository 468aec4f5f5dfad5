"""The tries made for one work item, as far as this shipper saw them."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from crashbus.consuming import Delivery
from crashbus.messages import WorkItem
from crashbus.parts import Attempt, CrashFile
from services.shipper import policy
from services.shipper.failure import Unfit
from services.shipper.settings import ShipperSettings

MAX_ERROR = 2000  # characters of an error in a dead letter
MAX_HISTORY = 50  # tries told in a dead letter: the first and the latest
MAX_REMEMBERED = 500  # items handed back whose tries are remembered; one forgotten is given more


@dataclass
class Tries:
    """The tries made for one item, as far as this shipper saw them.

    Attributes:
        before: tries that ended before this shipper had the item, at least.
        settled: names of files that were made dead letters while others were waited for.
        placed: files that several crashes share, with the names that they got there.
        unfit: for each file and reason, when it first failed like this, and how often it did.
    """

    before: int
    made: int = 0
    history: list[Attempt] = field(default_factory=list)
    settled: set[str] = field(default_factory=set)
    placed: dict[str, CrashFile] = field(default_factory=dict)
    unfit: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    _moved: float = field(default_factory=time.monotonic)

    @property
    def still_for(self) -> float:
        """Seconds since something moved."""
        return time.monotonic() - self._moved

    def moved(self) -> None:
        """Note that the delivery goes on."""
        self._moved = time.monotonic()

    @property
    def total(self) -> int:
        """All tries, at least."""
        return self.before + self.made

    def failed(self, error: BaseException) -> None:
        """Note a try that failed."""
        self.history.append(Attempt(time=time.time(), error=text_of(error)))
        del self.history[MAX_HISTORY // 2 : -MAX_HISTORY // 2]

    def may_mend_itself(self, failure: Unfit, settings: ShipperSettings) -> bool:
        """Note that a file cannot be delivered; tell whether it may be, later."""
        key, now = (failure.file.name, failure.reason), time.monotonic()
        first, failures = self.unfit.get(key, (now, 0))
        self.unfit[key] = (first, failures + 1)
        return policy.may_mend_itself(failure.reason, failures + 1, now - first, settings)


class Memory:
    """The tries of items that were handed back, so that a dead letter tells of all."""

    def __init__(self) -> None:
        self._tries: OrderedDict[tuple[str, ...], Tries] = OrderedDict()

    def recall(self, taken: Delivery[WorkItem]) -> Tries:
        """Return the tries of an item that was given out, and forget them."""
        tries = self._tries.pop(key_of(taken.message), None) or Tries(before=0)
        tries.moved()
        tries.before = max(tries.before, taken.attempts - 1 - tries.made)
        return tries

    def keep(self, item: WorkItem, tries: Tries) -> None:
        """Remember the tries of an item that is handed back."""
        self._tries[key_of(item)] = tries
        if len(self._tries) > MAX_REMEMBERED:
            self._tries.popitem(last=False)


def key_of(item: WorkItem) -> tuple[str, ...]:
    """Return what names an item among all."""
    return (item.crash_id, item.destination, *(file.name for file in item.files))


def text_of(error: BaseException) -> str:
    """Return an error as text that any message can carry, whatever was in it."""
    return str(error).encode("utf-8", "backslashreplace").decode()[:MAX_ERROR]
