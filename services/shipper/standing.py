"""How each destination has been doing, for health and for the patience shown to it."""

from services.common.health import Health
from services.shipper.failure import Failure, Unfit

TROUBLED_AFTER = 3  # failures in a row; one or two are what retries are for


class Standing:
    """The standing of one destination."""

    def __init__(self, url: str, health: Health) -> None:
        self._check = f"destination {url}"
        self._health = health
        self._failures = 0

    @property
    def troubled(self) -> bool:
        """Whether it has been failing for a while."""
        return self._failures >= TROUBLED_AFTER

    def failed(self, failure: Failure) -> None:
        """Note a failure; one that only concerns a file says nothing of the destination."""
        if isinstance(failure, Unfit):
            return
        self._failures += 1
        if self.troubled:
            self._health.failing(self._check, f"{failure}; {failure.mend}")

    def unusable(self, failure: Failure) -> None:
        """Note that it cannot be used at the start."""
        self._health.failing(self._check, f"{failure}; {failure.mend}")

    def succeeded(self) -> None:
        """Note a success."""
        self._failures = 0
        self._health.working(self._check)
