"""How each destination has been doing, for health and for the patience shown to it."""

import structlog

from services.common.health import Health
from services.shipper.failure import Failure, Unfit

log: structlog.stdlib.BoundLogger = structlog.get_logger()

TROUBLED_AFTER = 3  # failures in a row; one or two are what retries are for


class Standing:
    """The standing of one destination."""

    def __init__(self, url: str, health: Health) -> None:
        self._url = url
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
        if self._failures == TROUBLED_AFTER:
            log.warning(
                "destination keeps failing, trying on",
                destination=self._url,
                error=str(failure),
                mend=failure.mend,
            )
        if self.troubled:
            self._health.failing(self._check, f"{failure}; {failure.mend}")

    def unusable(self, failure: Failure) -> None:
        """Note that it cannot be used at the start."""
        self._health.failing(self._check, f"{failure}; {failure.mend}")

    def succeeded(self) -> None:
        """Note a success."""
        if self.troubled:
            log.info("destination works again", destination=self._url)
        self._failures = 0
        self._health.working(self._check)
