"""The fate of one work item: delivered with receipts, handed back, or made a dead letter."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import structlog

from crashbus.bus import Bus
from crashbus.consuming import Delivery as Taken
from crashbus.errors import BusUnreachable
from crashbus.messages import WorkItem
from crashbus.parts import CrashFile
from services.shipper import metrics, policy
from services.shipper.carrying import Carrier
from services.shipper.failure import Failure, Final, Passing, Unfit, not_configured
from services.shipper.holding import acknowledge, held
from services.shipper.place import Place
from services.shipper.reports import Reports
from services.shipper.settings import ShipperSettings
from services.shipper.tries import Memory, Tries, key_of

log: structlog.stdlib.BoundLogger = structlog.get_logger()

TAKE_BACK_WITHIN = 10.0  # seconds; a destination that is given up may well not answer


class Courier:
    """Settles work items.

    Args:
        places: the destinations that are served, by URL; no other is.
        name: which shipper this is, for receipts.
    """

    def __init__(
        self, bus: Bus, places: Mapping[str, Place], settings: ShipperSettings, name: str
    ) -> None:
        self._places = places
        self._settings = settings
        self._carrier = Carrier(bus, settings.stall)
        self._reports = Reports(bus, settings, name)
        self._memory = Memory()
        self._in_hand: set[tuple[str, ...]] = set()

    async def settle(self, taken: Taken[WorkItem]) -> str:
        """Settle one item, and return how. When cancelled, hand it back."""
        item = taken.message
        place = self._places.get(item.destination)
        label = place.url if place else "unknown"
        key = key_of(item)
        if key in self._in_hand:  # the bus took us for dead, or it was published twice
            result = await self._leave_to_other_hand(taken)
        else:
            started = time.monotonic()
            self._in_hand.add(key)
            try:
                result = await self._settle_alone(taken, place)
            finally:
                self._in_hand.discard(key)
            metrics.SECONDS.labels(label).observe(time.monotonic() - started)
        metrics.DELIVERIES.labels(label, result).inc()
        return result

    async def _leave_to_other_hand(self, taken: Taken[WorkItem]) -> str:
        """Hand back what another hand here is at: its acknowledgement counts for both."""
        with suppress(BusUnreachable):
            await taken.retry(self._settings.ack_wait)
        return "in_hand"

    async def _settle_alone(self, taken: Taken[WorkItem], place: Place | None) -> str:
        if place is None:
            return await self._refuse(taken)
        tries = self._memory.recall(taken)
        async with held(taken, tries, self._settings):
            return await self._settle(taken, place, tries)

    async def _settle(self, taken: Taken[WorkItem], place: Place, tries: Tries) -> str:
        item = taken.message
        if place.standing.is_open and place.standing.failure is not None:
            return await self._put_off(taken, place, tries)
        remaining = [file for file in item.files if file.name not in tries.settled]
        # A shipper may have died between receipt and acknowledgement. Of that nats-server 2.9 does
        # not always tell: it counts from one again after it lost sight of an item.
        if taken.attempts > 1 or place.deliverer.shows_repeats:
            remaining = await self._reports.undelivered(item, remaining)
        if not remaining:
            await acknowledge(taken)
            log.info("was delivered before", destination=place.url)
            return "already_delivered"
        try:
            await self._deliver_all(item, remaining, place, tries)
        except Passing as failure:
            if not place.policy.is_too_late(taken.published, time.time()):
                return await self._hand_back(taken, place, failure, tries)
            await self._dead_letter(item, remaining, failure, tries)
        await acknowledge(taken)
        return "dead_lettered" if tries.settled else "delivered"

    async def _put_off(self, taken: Taken[WorkItem], place: Place, tries: Tries) -> str:
        """Settle an item of a destination that nothing is tried with now."""
        failure = place.standing.failure
        assert failure is not None
        item = taken.message
        if not place.policy.is_too_late(taken.published, time.time()):
            return await self._hand_back(taken, place, failure, tries)
        remaining = await self._reports.undelivered(item, item.files)
        remaining = [file for file in remaining if file.name not in tries.settled]
        if remaining:
            await self._dead_letter(item, remaining, failure, tries)
        await acknowledge(taken)
        return "dead_lettered"

    async def _refuse(self, taken: Taken[WorkItem]) -> str:
        item = taken.message
        # Our consumers give out only what is ours: it stands on the subject of another item.
        failure = not_configured(item.destination)
        metrics.FAILURES.labels("unknown", failure.reason).inc()
        await self._dead_letter(item, item.files, failure, Tries(before=0))
        await acknowledge(taken)
        return "dead_lettered"

    async def _deliver_all(
        self, item: WorkItem, remaining: list[CrashFile], place: Place, tries: Tries
    ) -> None:
        """Deliver files of an item, or make those dead letters that are refused for good.

        One file that cannot be delivered does not keep back the others.

        Args:
            remaining: the files; what is settled is taken out.

        Raises:
            Passing: what remains is worth another try later.
        """
        waiting: dict[str, Unfit] = {}
        while files := [file for file in remaining if file.name not in waiting]:
            try:
                await self._carrier.carry(item, files, place, tries)
            except Unfit as failure:
                if await self._is_worth_waiting(item, failure, tries):
                    waiting[failure.file.name] = failure
                else:
                    remaining.remove(failure.file)
            except Final as failure:
                await self._dead_letter(item, remaining, failure, tries)
                return
            except Passing as failure:
                left = await self._left_by_others(item, remaining, failure)
                if len(left) == len(remaining):
                    raise
                remaining[:] = left
            else:
                await self._reports.receipts(item, files, place, tries)
                remaining[:] = [file for file in remaining if file.name in waiting]
        if waiting:
            first = next(iter(waiting.values()))
            raise Passing(first.reason, str(first), first.mend)

    async def _left_by_others(
        self, item: WorkItem, files: list[CrashFile], failure: Passing
    ) -> list[CrashFile]:
        """Return what no other shipper has delivered, after a sign that one did.

        An item that was given out twice is begun by two shippers: the first to complete the
        upload takes it from the other.
        """
        if failure.reason != policy.UPLOAD_VANISHED:
            return files
        return await self._reports.undelivered(item, files)

    async def _is_worth_waiting(self, item: WorkItem, failure: Unfit, tries: Tries) -> bool:
        """Tell whether a file may be delivered later; if not, see that it is settled."""
        missing = failure.reason == "chunks_missing"
        if missing and not await self._reports.undelivered(item, [failure.file]):
            log.info("was delivered before", file=failure.file.name)
            return False
        if tries.may_mend_itself(failure, self._settings):
            log.info("waiting for its chunks", file=failure.file.name, error=str(failure))
            return True
        await self._dead_letter(item, [failure.file], failure, tries)
        return False

    async def _dead_letter(
        self, item: WorkItem, files: Sequence[CrashFile], failure: Failure, tries: Tries
    ) -> None:
        await self._take_back(item, files)
        await self._reports.dead_letter(item, files, failure, tries)
        tries.settled.update(file.name for file in files)

    async def _take_back(self, item: WorkItem, files: Sequence[CrashFile]) -> None:
        """Leave nothing at a destination of files that are given up, if it can be reached."""
        place = self._places.get(item.destination)
        if place is None:
            return
        try:
            async with asyncio.timeout(TAKE_BACK_WITHIN):
                for file in files:
                    await place.deliverer.give_up(item.folder_of(file), file)
        except (Failure, TimeoutError) as error:
            log.warning("what was begun stays for now", destination=place.url, error=str(error))

    async def _hand_back(
        self, taken: Taken[WorkItem], place: Place, failure: Failure, tries: Tries
    ) -> str:
        self._memory.keep(taken.message, tries)
        delay = place.policy.hand_back_delay(taken.attempts)
        delay = max(delay, place.standing.due_in)
        # A destination that is away hands back many; its standing says so once.
        log.debug("handed back", destination=place.url, error=str(failure), seconds=delay)
        with suppress(BusUnreachable):  # it comes again by itself
            await taken.retry(delay)
        if tries.made:
            given_up = taken.published + place.policy.give_up
            await self._reports.postponed(taken, failure, tries, delay, given_up)
        return "handed_back"
