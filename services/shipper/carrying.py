"""The way of files to their destination, tried again as its policy has it."""

import asyncio
from collections.abc import Sequence

import structlog

from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable
from crashbus.layout import SHARED
from crashbus.messages import WorkItem
from crashbus.parts import CrashFile
from services.shipper import metrics
from services.shipper.destinations.base import Deliverer
from services.shipper.failure import Failure, Passing, Unfit
from services.shipper.place import Place
from services.shipper.source import Source
from services.shipper.standing import Circuit
from services.shipper.tries import Tries

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MAX_URL = 2048  # characters, as the wire contract has it


class Carrier:
    """Carries files of work items from the bus to their destinations.

    Args:
        stall: seconds in which something must move.
    """

    def __init__(self, bus: Bus, stall: float) -> None:
        self._bus = bus
        self._stall = stall

    async def carry(
        self, item: WorkItem, files: Sequence[CrashFile], place: Place, tries: Tries
    ) -> None:
        """Deliver files of an item together, however long the bus is away.

        Args:
            tries: told of each try.

        Raises:
            Failure: why they cannot be delivered, or not now.
        """

        def on_retry(error: BaseException) -> None:
            tries.moved()
            metrics.RETRIES.labels(place.url).inc()
            log.info("trying again", destination=place.url, error=str(error), tries=tries.total)

        def hopeless() -> bool:
            return place.standing.circuit is not Circuit.CLOSED

        retries = place.policy.retries(on_retry, hopeless)
        await retries(self._try, item, files, place, tries)

    async def _try(
        self, item: WorkItem, files: Sequence[CrashFile], place: Place, tries: Tries
    ) -> None:
        tries.made += 1
        try:
            await self._deliver_new(item, files, place.deliverer, tries)
        except Failure as failure:
            tries.failed(failure)
            metrics.FAILURES.labels(place.url, failure.reason).inc()
            place.standing.failed(failure)
            raise
        except (BusUnreachable, BusFull) as error:
            tries.failed(error)
            metrics.FAILURES.labels(place.url, "bus_unreachable").inc()
            raise
        place.standing.succeeded()
        stored = sum(file.stored_size for file in files)
        metrics.BYTES_OUT.labels(place.url).inc(stored)

    async def _deliver_new(
        self, item: WorkItem, files: Sequence[CrashFile], deliverer: Deliverer, tries: Tries
    ) -> None:
        """Deliver what does not lie there already: what several crashes share may."""
        own = [file for file in files if file.kind not in SHARED]
        if own:
            await self._deliver(item, own, deliverer, tries)
        for file in files:
            if file.kind in SHARED:
                placed, is_there = await _placed(item, file, deliverer)
                tries.placed[file.name] = placed
                if is_there:
                    log.info("lies there already", url=deliverer.url_of(item.folder_of(file), file))
                else:
                    await self._deliver(item, [placed], deliverer, tries)

    async def _deliver(
        self, item: WorkItem, files: Sequence[CrashFile], deliverer: Deliverer, tries: Tries
    ) -> None:
        _check_urls(item, files, deliverer)
        loop, stall = asyncio.get_running_loop(), self._stall
        try:
            async with asyncio.timeout(stall) as limit:

                def progress() -> None:
                    tries.moved()
                    limit.reschedule(loop.time() + stall)

                sources = [Source(self._bus, item.crash_id, file, progress) for file in files]
                progress()
                await deliverer.deliver(item.folder_of(files[0]), sources)
        except TimeoutError as error:
            raise Passing(
                "stalled", f"nothing moved for {stall:g} s", "see why the destination is slow"
            ) from error
        except (Failure, BusUnreachable, BusFull):
            raise
        except Exception as error:
            # One item that we cannot handle must not end the service; it is told, and kept.
            log.exception("unexpected error in a delivery")
            raise Passing(
                "internal_error",
                f"{type(error).__name__}: {error}",
                "report this with the shipper's log; the crash files are kept",
            ) from error


def _check_urls(item: WorkItem, files: Sequence[CrashFile], deliverer: Deliverer) -> None:
    for file in files:
        if len(deliverer.url_of(item.folder_of(file), file)) > MAX_URL:
            mend = "shorten the destination's path or the host's name"
            raise Unfit(file, "name_too_long", f"its URL exceeds {MAX_URL} characters", mend)


async def _placed(item: WorkItem, file: CrashFile, deliverer: Deliverer) -> tuple[CrashFile, bool]:
    """Return a shared file under the name that it is to have, and whether it lies there.

    Of one build ID there may be several contents (stripped or not, or a forged one), and none
    may take another's place: the first has the usual name.
    """
    for named in (file, file.beside_another):
        found = await deliverer.sha256_of(item.folder_of(named), named.stored_name)
        if found in (None, named.sha256):
            return named, found is not None
    return file.beside_another, False
