"""How each destination has been doing: its circuit breaker, and what health tells of it.

Closed, all hands deliver. After some failures in a row it opens: no item is taken for a while, so
that a dead destination costs neither hands nor tries. Then the destination is looked at; if that
goes well it is half open, and one item is tried: its success closes the circuit, its failure opens
it again, for twice as long.
"""

import time
from collections.abc import Callable
from enum import IntEnum

import structlog

from services.common.health import Health
from services.shipper import metrics
from services.shipper.failure import OF_ONE_ITEM, Failure, Passing, Unfit
from services.shipper.policy import Policy

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# What no look shows, such as that a key may not write to a bucket.
SEEN_BY_ITEMS_ALONE = frozenset({"access_denied", "quota_exceeded", "disk_full"})
OPENS_AFTER = 3  # failures in a row; one or two are what retries are for


class Circuit(IntEnum):
    """The states of a circuit breaker, as the metric shows them."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Standing:
    """The standing of one destination.

    Args:
        clock: seconds that never go back.

    Attributes:
        failure: the last one that concerned the destination itself.
    """

    def __init__(
        self,
        url: str,
        health: Health,
        policy: Policy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._check = f"destination {url}"
        self._health = health
        self._first, self._cap = policy.first, policy.cap
        self._clock = clock
        self._in_a_row = 0
        self._openings = 0  # since it was closed
        self._due = 0.0
        self._is_told = False
        self._only_items_tell = False  # whether what is wrong can be mended
        self.failure: Failure | None = None
        self._enter(Circuit.CLOSED)

    @property
    def circuit(self) -> Circuit:
        """The state of the circuit breaker."""
        return self._circuit

    @property
    def is_open(self) -> bool:
        """Whether nothing shall be tried now."""
        return self._circuit is Circuit.OPEN

    @property
    def due_in(self) -> float:
        """Seconds until the destination is to be looked at; 0 where it is not open."""
        return max(0.0, self._due - self._clock()) if self.is_open else 0.0

    def failed(self, failure: Failure) -> None:
        """Note a failure; one that only concerns an item says nothing of the destination.

        A destination that refuses for good answers: its items become dead letters at once, for
        all to see, and do not wait behind an open circuit.
        """
        if isinstance(failure, Unfit) or failure.reason in OF_ONE_ITEM:
            return
        self.failure = failure
        # Where a look had gone well before an item failed, looks do not show what is wrong.
        after_a_look = self._circuit is Circuit.HALF_OPEN
        self._only_items_tell = after_a_look or failure.reason in SEEN_BY_ITEMS_ALONE
        self._in_a_row += 1
        if self._in_a_row == OPENS_AFTER:
            log.warning(
                "destination keeps failing, trying on",
                destination=self._url,
                error=str(failure),
                mend=failure.mend,
            )
        if self._in_a_row >= OPENS_AFTER:
            self._tell(failure)
        fails_on = self._circuit is Circuit.HALF_OPEN or self._in_a_row >= OPENS_AFTER
        if isinstance(failure, Passing) and fails_on and not self.is_open:
            self._open()

    def looked_at(self, failure: Failure | None) -> None:
        """Note how a look at it went; one that went well, with None, says nothing of an item.

        Other shippers may have delivered all there was since this one failed, so a look that goes
        well ends its complaint, unless of what no look shows.
        """
        if failure is not None:
            self.failure = failure
            self._only_items_tell = False
            self._tell(failure)
        if isinstance(failure, Passing):
            if self.is_open and not self.due_in:  # both kinds of hands may have looked
                self._open()
            return
        if self.is_open:
            self._enter(Circuit.HALF_OPEN)  # it answers; an item will tell the rest
        if failure is None and not self._only_items_tell:
            self._calm()

    def _calm(self) -> None:
        self._is_told = False
        self._health.working(self._check)

    @property
    def is_told(self) -> bool:
        """Whether health complains of it."""
        return self._is_told

    def succeeded(self) -> None:
        """Note that something was delivered."""
        if self._in_a_row >= OPENS_AFTER:
            log.info("destination works again", destination=self._url)
        self._in_a_row = self._openings = 0
        self._enter(Circuit.CLOSED)
        self._calm()

    def _tell(self, failure: Failure) -> None:
        self._is_told = True
        self._health.failing(self._check, f"{failure}; {failure.mend}")

    def _open(self) -> None:
        self._openings += 1
        wait = min(self._cap, self._first * 2.0 ** min(self._openings, 30))
        self._due = self._clock() + wait
        self._enter(Circuit.OPEN)

    def _enter(self, circuit: Circuit) -> None:
        self._circuit = circuit
        metrics.CIRCUIT.labels(self._url).set(circuit)
