"""What failed for good and is not told on the bus any more: told again.

Dead letters go with the bus's store, with their age, or when too many came after them. What they
told of can be delivered for as long as its source is kept, and nobody would know; the ledger does.
"""

import asyncio
import random
from collections.abc import Iterable, Iterator

import structlog

from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable
from crashbus.messages import DeadLetter, Manifest
from crashbus.names import token
from services.collector import metrics
from services.collector.ledger import Crash, Ledger, Source, Told
from services.collector.offering import letter_of
from services.collector.plan import all_sources

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_EVERY = 10  # times as seldom as deliveries are compared with the bus
PAUSE = 0.1  # seconds between crashes: of thousands that failed, ten a second are looked at


class Failures:
    """Compares what the ledger holds as failed with the dead letters on the bus.

    Args:
        recheck: seconds between comparisons of unfinished deliveries with the bus.
    """

    def __init__(self, bus: Bus, ledger: Ledger, recheck: float) -> None:
        self._bus = bus
        self._ledger = ledger
        self._every = recheck * LOOK_EVERY

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.look()
            except (BusUnreachable, BusFull) as error:
                log.warning("failures are told again later", error=str(error))
            await asyncio.sleep(self._every * random.uniform(0.7, 1.3))  # noqa: S311 - no secret

    async def look(self) -> None:
        """Tell what is not told."""
        for crash in self._ledger.open_crashes():
            if any(_failed(crash)):
                try:
                    await self._tell(crash)
                except (BusUnreachable, BusFull):
                    raise
                except Exception:  # one odd crash must not end the rest
                    metrics.FAULTS.labels("failures").inc()
                    log.exception("cannot tell failures again", crash_id=crash.crash_id)
                await asyncio.sleep(PAUSE)
        log.debug("compared failures with the bus")

    async def _tell(self, crash: Crash) -> None:
        subject = f"{token(crash.host)}.{crash.crash_id}"
        letters = await self._bus.stored(DeadLetter, f"crash.failed.{subject}")
        untold = [*untold_letters(crash, letters)]
        # Also one that names no file, for none could be read.
        if crash.reported is not None and not await self._bus.holds(
            Manifest, f"crash.report.{subject}"
        ):
            await self._bus.publish(crash.to_manifest())  # who it was that crashed
        for letter in untold:
            await self._bus.publish(letter)
        if untold:
            log.info("told failures again", crash_id=crash.crash_id, letters=len(untold))


def untold_letters(crash: Crash, letters: Iterable[DeadLetter]) -> Iterator[DeadLetter]:
    """Give a dead letter for each file and reason of which none of these tells.

    Args:
        letters: what the bus holds of this crash.
    """
    latest: dict[tuple[str, str], float] = {}
    for letter in letters:
        latest |= dict.fromkeys(letter.given_up(), letter.time)
    for source in _failed(crash):
        places: dict[tuple[str, str, str], list[str]] = {}
        for place, reason in source.failed.items():
            # An older one was answered, by a replay or by chunks that were published anew.
            if latest.get((place, source.name), 0.0) <= source.renewed_for:
                told = source.told.get(place, Told())
                places.setdefault((reason, told.error, told.mend), []).append(place)
        for (reason, error, mend), waiting in places.items():
            yield letter_of(crash, source, tuple(waiting), reason, Told(error=error, mend=mend))


def _failed(crash: Crash) -> Iterator[Source]:
    """Give the files that failed for good and are still here."""
    return (source for source in all_sources(crash) if source.failed and not source.lost)
