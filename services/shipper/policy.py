"""When to try again, and when to stop trying: pure decisions, and policies as values."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
    wait_random,
)
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from crashbus.destination import Scheme
from crashbus.errors import BusFull, BusUnreachable
from services.shipper.failure import Passing
from services.shipper.settings import ShipperSettings

MISSING_TRIES = 3  # at least, for chunks that are not there
DAMAGED_TRIES = 2
UPLOAD_VANISHED = "upload_vanished"
OVERLOAD = frozenset({"slow_down", "server_unavailable"})
OVERLOADED = 4  # times the usual waits, for a server that says it is overloaded
BUS_FAILURES = (BusUnreachable, BusFull)


class _UnlessBus(stop_base):
    """Stop as another policy says, but never for the bus: without it nothing can be handed back."""

    def __init__(self, stop: stop_base) -> None:
        self._stop = stop

    def __call__(self, retry_state: RetryCallState) -> bool:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        return not isinstance(error, BUS_FAILURES) and self._stop(retry_state)


class _When(stop_base):
    """Stop as soon as something is so."""

    def __init__(self, is_so: Callable[[], bool]) -> None:
        self._is_so = is_so

    def __call__(self, retry_state: RetryCallState) -> bool:
        return self._is_so()


def worth_another_try(error: BaseException) -> bool:
    """Tell whether the same call may succeed a little later."""
    return isinstance(error, (Passing, *BUS_FAILURES)) and not _is_of_another(error)


def _is_of_another(error: BaseException) -> bool:
    """Tell whether another shipper may have done what we were doing: that is looked at first."""
    return isinstance(error, Passing) and error.reason == UPLOAD_VANISHED


@dataclass(frozen=True)
class Policy:
    """How deliveries to one destination are tried again.

    Attributes:
        first: seconds before the first retry; then doubled.
        cap: seconds between retries at most.
        in_hand: seconds of retries before an item goes back to the bus for a while.
        give_up: seconds after its publication at which an item that still fails is given up.
    """

    first: float
    cap: float
    in_hand: float
    give_up: float

    @classmethod
    def of(cls, scheme: Scheme, settings: ShipperSettings) -> "Policy":
        """Return the policy of a kind of destination: the general one, but for what is its own."""
        general = cls(
            first=settings.retry_first,
            cap=settings.retry_cap,
            in_hand=settings.retry_in_hand,
            give_up=settings.give_up,
        )
        own = {"s3": settings.retry_s3, "file": settings.retry_file}.get(scheme, settings.retry_tcp)
        return replace(general, **own)

    def retries(
        self, on_retry: Callable[[BaseException], None], hopeless: Callable[[], bool]
    ) -> AsyncRetrying:
        """Return what tries an item in hand.

        Args:
            on_retry: called with the error before each wait.
            hopeless: the destination has been failing, for others too: an item does not hold a
                hand for a try that another has just made.
        """
        return AsyncRetrying(
            retry=retry_if_exception(worth_another_try),
            wait=_PaceOf(self),
            stop=_UnlessBus(stop_after_delay(self.in_hand) | _When(hopeless)),
            before_sleep=_telling(on_retry),
            reraise=True,
        )

    def hand_back_delay(self, deliveries: int) -> float:
        """Return the seconds an item rests on the bus: doubled each time, up to the cap.

        The jitter of a half spreads items that failed together.

        Args:
            deliveries: how often the bus has given the item out.
        """
        longest = min(self.cap, self.first * 2.0 ** min(deliveries, 30))
        return longest * random.uniform(0.5, 1)  # noqa: S311 - no secret depends on it

    def is_too_late(self, published: float, now: float) -> bool:
        """Tell whether an item that still fails is to be given up (times in Unix seconds)."""
        return now - published > self.give_up


class _PaceOf(wait_base):
    """Wait as is fit for the failure: a server that is overloaded gets more time."""

    def __init__(self, policy: Policy) -> None:
        self._usual = _backoff(policy.first, policy.cap)
        self._patient = _backoff(policy.first * OVERLOADED, policy.cap)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        overloaded = isinstance(error, Passing) and error.reason in OVERLOAD
        return (self._patient if overloaded else self._usual)(retry_state)


def until_bus_answers(
    settings: ShipperSettings, on_retry: Callable[[BaseException], None]
) -> AsyncRetrying:
    """Return the policy for a word that must reach the bus: for ever."""
    return AsyncRetrying(
        retry=retry_if_exception_type(BUS_FAILURES),
        wait=_backoff(settings.retry_first, settings.retry_cap),
        before_sleep=_telling(on_retry),
        reraise=True,
    )


def _backoff(first: float, cap: float) -> wait_base:
    return wait_exponential(multiplier=first, max=cap) + wait_random(0, first)


def _telling(on_retry: Callable[[BaseException], None]) -> Callable[[RetryCallState], None]:
    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error is not None:
            on_retry(error)

    return tell


def may_mend_itself(reason: str, failures: int, waited: float, settings: ShipperSettings) -> bool:
    """Tell whether a file that cannot be read from the bus is worth another try later.

    Chunks that are missing are published again by the collector when it next compares its ledger
    with the bus, without any letter; so they are waited for. A file that is damaged it publishes
    again only on a dead letter, and a letter too early costs only time. But a reader that comes
    while chunks are removed and sent again may see old and new ones; hence one more try.

    Args:
        failures: how often the file failed like this, this time included.
        waited: seconds since it first did.
    """
    match reason:
        case "chunks_missing":
            return failures < MISSING_TRIES or waited < settings.source_patience
        case "damaged_file":
            return failures < DAMAGED_TRIES
        case _:
            return False
