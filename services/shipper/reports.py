"""What a shipper tells on the bus of its deliveries, and what it finds told there."""

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar, TypeVarTuple

import structlog

from crashbus import names
from crashbus.bus import Bus
from crashbus.consuming import Delivery
from crashbus.errors import BusFull, BusUnreachable, MessageTooLarge
from crashbus.messages import DeadLetter, Postponed, Receipt, WorkItem
from crashbus.parts import CrashFile
from services.shipper import policy
from services.shipper.failure import Failure
from services.shipper.place import Place
from services.shipper.settings import ShipperSettings
from services.shipper.tries import Tries, text_of

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


class Reports:
    """Receipts, dead letters and the like; what must be told waits for the bus.

    Args:
        name: which shipper this is, for receipts.
    """

    def __init__(self, bus: Bus, settings: ShipperSettings, name: str) -> None:
        self._bus = bus
        self._settings = settings
        self._name = name

    async def receipts(
        self, item: WorkItem, files: Sequence[CrashFile], place: Place, tries: Tries
    ) -> None:
        """Tell that files lie verified at their destination."""
        for file in (tries.placed.get(one.name, one) for one in files):
            receipt = Receipt(
                host=item.host,
                crash_id=item.crash_id,
                file=file,
                destination=item.destination,
                url=place.deliverer.url_of(item.folder_of(file), file),
                attempts=tries.total,
                shipper=self._name,
            )
            await self._with_bus(self._bus.publish, receipt)
            log.info("delivered", url=receipt.url, bytes=file.stored_size, attempts=tries.total)

    async def dead_letter(
        self, item: WorkItem, files: Sequence[CrashFile], failure: Failure, tries: Tries
    ) -> None:
        """Tell that files of an item are given up."""
        letter = DeadLetter(
            host=item.host,
            crash_id=item.crash_id,
            service="shipper",
            reason=failure.reason,
            error=text_of(failure),
            mend=failure.mend,
            attempts=tries.total,
            history=tuple(tries.history),
            work=item.model_copy(update={"files": tuple(files)}),
        )
        log.error(
            "cannot be delivered",
            destination=item.destination,
            files=[file.name for file in files],
            reason=failure.reason,
            error=text_of(failure),
            mend=failure.mend,
        )
        await self._with_bus(self._bus.publish, letter)

    async def undelivered(self, item: WorkItem, files: Sequence[CrashFile]) -> list[CrashFile]:
        """Return those files of an item that have no receipt."""
        subject = f"crash.shipped.{names.token(item.host)}.{item.crash_id}"
        receipts = await self._with_bus(self._bus.stored, Receipt, subject)
        delivered = {
            (one.file.name, one.file.sha256)
            for one in receipts
            if one.destination == item.destination
        }
        return [file for file in files if (file.name, file.sha256) not in delivered]

    async def postponed(
        self,
        taken: Delivery[WorkItem],
        failure: Failure,
        tries: Tries,
        delay: float,
        given_up: float,
    ) -> None:
        """Let people see why a delivery takes so long; no matter if that fails.

        Args:
            delay: seconds until the next try.
            given_up: when there will be none any more, in Unix seconds.
        """
        item, now = taken.message, time.time()
        with suppress(BusUnreachable, BusFull, MessageTooLarge):
            await self._bus.publish(
                Postponed(
                    host=item.host,
                    crash_id=item.crash_id,
                    destination=item.destination,
                    files=tuple(file.name for file in item.files),
                    reason=failure.reason,
                    error=text_of(failure),
                    mend=failure.mend,
                    attempts=tries.total,
                    next_try=now + delay,
                    given_up=given_up,
                )
            )

    async def _with_bus(self, call: Callable[[*Ts], Awaitable[R]], *args: *Ts) -> R:
        """Do something that needs the bus, however long it is away."""

        def on_retry(error: BaseException) -> None:
            log.warning("waiting for the bus", error=str(error))

        return await policy.until_bus_answers(self._settings, on_retry)(call, *args)
