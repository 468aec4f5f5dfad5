"""The fate of one work item: delivered with receipts, handed back, or made a dead letter."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar, TypeVarTuple

import structlog

from crashbus import names
from crashbus.bus import Bus
from crashbus.bus import Delivery as Taken
from crashbus.errors import BusFull, BusUnreachable
from crashbus.layout import SHARED
from crashbus.messages import Attempt, CrashFile, DeadLetter, Receipt, WorkItem
from services.shipper import metrics, policy
from services.shipper.destinations.base import Deliverer
from services.shipper.failure import Failure, Final, Passing, Unfit, not_configured
from services.shipper.settings import ShipperSettings
from services.shipper.source import Source
from services.shipper.standing import Standing

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Ts = TypeVarTuple("Ts")
R = TypeVar("R")

MAX_ERROR = 2000  # characters of an error in a dead letter
MAX_HISTORY = 50  # tries told in a dead letter: the first and the latest
MAX_URL = 2048  # characters, as the wire contract has it
MAX_REMEMBERED = 500  # items handed back whose tries are remembered; one forgotten is given more
HAND_BACK_WITHIN = 1.0  # seconds, on the way out


@dataclass(frozen=True)
class Place:
    """A destination that the settings name, and what delivers to it."""

    deliverer: Deliverer
    standing: Standing

    @property
    def url(self) -> str:
        """As work items name it."""
        return self.deliverer.destination.url


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

    @property
    def total(self) -> int:
        """All tries, at least."""
        return self.before + self.made

    def failed(self, error: BaseException) -> None:
        """Note a try that failed."""
        self.history.append(Attempt(time=time.time(), error=_text(error)))
        del self.history[MAX_HISTORY // 2 : -MAX_HISTORY // 2]

    def may_mend_itself(self, failure: Unfit, settings: ShipperSettings) -> bool:
        """Note that a file cannot be delivered; tell whether it may be, later."""
        key, now = (failure.file.name, failure.reason), time.monotonic()
        first, failures = self.unfit.get(key, (now, 0))
        self.unfit[key] = (first, failures + 1)
        return policy.may_mend_itself(failure.reason, failures + 1, now - first, settings)


class Courier:
    """Settles work items.

    Args:
        places: the destinations that are served, by URL; no other is.
        name: which shipper this is, for receipts.
    """

    def __init__(
        self, bus: Bus, places: Mapping[str, Place], settings: ShipperSettings, name: str
    ) -> None:
        self._bus = bus
        self._places = places
        self._settings = settings
        self._name = name
        self._handed_back: dict[tuple[str, ...], Tries] = {}  # so that a dead letter tells all

    async def settle(self, taken: Taken[WorkItem]) -> None:
        """Settle one item. When cancelled, take back what was begun and hand the item back."""
        item = taken.message
        place = self._places.get(item.destination)
        label = place.url if place else "unknown"
        started = time.monotonic()
        try:
            async with self._heartbeat(taken):
                result = await self._settle(taken, place)
        except asyncio.CancelledError:
            await self._hand_back_now(taken)
            raise
        metrics.DELIVERIES.labels(label, result).inc()
        metrics.SECONDS.labels(label).observe(time.monotonic() - started)

    async def _settle(self, taken: Taken[WorkItem], place: Place | None) -> str:
        if place is None:
            return await self._refuse(taken)
        item, tries = taken.message, self._earlier_tries(taken)
        remaining = [file for file in item.files if file.name not in tries.settled]
        if taken.attempts > 1:  # a shipper may have died between receipt and acknowledgement
            remaining = await self._undelivered(item, remaining)
        if not remaining:
            await self._ack(taken)
            log.info("was delivered before", destination=place.url)
            return "already_delivered"
        try:
            await self._deliver_all(item, remaining, place, tries)
        except Passing as failure:
            if not policy.is_too_late(taken.published, time.time(), self._settings):
                return await self._hand_back(taken, failure, tries)
            await self._dead_letter(item, remaining, failure, tries)
        await self._ack(taken)
        return "dead_lettered" if tries.settled else "delivered"

    async def _refuse(self, taken: Taken[WorkItem]) -> str:
        item = taken.message
        # Our consumers give out only what is ours: it stands on the subject of another item.
        failure = not_configured(item.destination)
        metrics.FAILURES.labels("unknown", failure.reason).inc()
        await self._dead_letter(item, item.files, failure, Tries(before=0))
        await self._ack(taken)
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
                await self._retrying(item, files, place, tries)
            except Unfit as failure:
                if await self._is_worth_waiting(item, failure, tries):
                    waiting[failure.file.name] = failure
                else:
                    remaining.remove(failure.file)
            except Final as failure:
                await self._dead_letter(item, remaining, failure, tries)
                return
            else:
                await self._publish_receipts(item, files, place, tries)
                remaining[:] = [file for file in remaining if file.name in waiting]
        if waiting:
            first = next(iter(waiting.values()))
            raise Passing(first.reason, str(first), first.mend)

    async def _is_worth_waiting(self, item: WorkItem, failure: Unfit, tries: Tries) -> bool:
        """Tell whether a file may be delivered later; if not, see that it is settled."""
        missing = failure.reason == "chunks_missing"
        if missing and not await self._undelivered(item, [failure.file]):
            log.info("was delivered before", file=failure.file.name)
            return False
        if tries.may_mend_itself(failure, self._settings):
            log.info("waiting for its chunks", file=failure.file.name, error=str(failure))
            return True
        await self._dead_letter(item, [failure.file], failure, tries)
        return False

    async def _retrying(
        self, item: WorkItem, files: Sequence[CrashFile], place: Place, tries: Tries
    ) -> None:
        def on_retry(error: BaseException) -> None:
            metrics.RETRIES.labels(place.url).inc()
            log.info("trying again", destination=place.url, error=str(error), tries=tries.total)

        retries = policy.in_hand(self._settings, on_retry, place.standing.troubled)
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
            await self._deliver(item, own, deliverer)
        for file in files:
            if file.kind in SHARED:
                placed, is_there = await _placed(item, file, deliverer)
                tries.placed[file.name] = placed
                if is_there:
                    log.info("lies there already", url=deliverer.url_of(item.folder_of(file), file))
                else:
                    await self._deliver(item, [placed], deliverer)

    async def _deliver(
        self, item: WorkItem, files: Sequence[CrashFile], deliverer: Deliverer
    ) -> None:
        for file in files:
            if len(deliverer.url_of(item.folder_of(file), file)) > MAX_URL:
                mend = "shorten the destination's path or the host's name"
                raise Unfit(file, "name_too_long", f"its URL exceeds {MAX_URL} characters", mend)
        loop, stall = asyncio.get_running_loop(), self._settings.stall
        try:
            async with asyncio.timeout(stall) as limit:
                sources = [
                    Source(
                        self._bus,
                        item.crash_id,
                        file,
                        progress=lambda: limit.reschedule(loop.time() + stall),
                    )
                    for file in files
                ]
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

    async def _publish_receipts(
        self, item: WorkItem, files: Sequence[CrashFile], place: Place, tries: Tries
    ) -> None:
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

    async def _dead_letter(
        self, item: WorkItem, files: Sequence[CrashFile], failure: Failure, tries: Tries
    ) -> None:
        letter = DeadLetter(
            host=item.host,
            crash_id=item.crash_id,
            service="shipper",
            reason=failure.reason,
            error=_text(failure),
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
            error=_text(failure),
            mend=failure.mend,
        )
        await self._with_bus(self._bus.publish, letter)
        tries.settled.update(file.name for file in files)

    async def _undelivered(self, item: WorkItem, files: Sequence[CrashFile]) -> list[CrashFile]:
        """Return those files of an item that have no receipt."""
        subject = f"crash.shipped.{names.token(item.host)}.{item.crash_id}"
        receipts = await self._with_bus(self._bus.stored, Receipt, subject)
        delivered = {
            (one.file.name, one.file.sha256)
            for one in receipts
            if one.destination == item.destination
        }
        return [file for file in files if (file.name, file.sha256) not in delivered]

    async def _with_bus(self, call: Callable[[*Ts], Awaitable[R]], *args: *Ts) -> R:
        """Do something that needs the bus, however long it is away."""

        def on_retry(error: BaseException) -> None:
            log.warning("waiting for the bus", error=str(error))

        return await policy.until_bus_answers(self._settings, on_retry)(call, *args)

    def _earlier_tries(self, taken: Taken[WorkItem]) -> Tries:
        tries = self._handed_back.pop(_key(taken.message), None) or Tries(before=0)
        tries.before = max(tries.before, taken.attempts - 1 - tries.made)
        return tries

    async def _hand_back(self, taken: Taken[WorkItem], failure: Passing, tries: Tries) -> str:
        self._handed_back[_key(taken.message)] = tries
        if len(self._handed_back) > MAX_REMEMBERED:
            self._handed_back.pop(next(iter(self._handed_back)))
        delay = policy.hand_back_delay(taken.attempts, self._settings)
        # A destination that is away hands back by the thousand; its standing says so once.
        log.debug(
            "handed back", destination=taken.message.destination, error=str(failure), seconds=delay
        )
        with suppress(BusUnreachable):  # it comes again by itself
            await taken.retry(delay)
        return "handed_back"

    async def _hand_back_now(self, taken: Taken[WorkItem]) -> None:
        log.info("stopping, handed back", destination=taken.message.destination)
        with suppress(BusUnreachable, TimeoutError):
            await asyncio.wait_for(taken.retry(0), HAND_BACK_WITHIN)

    async def _ack(self, taken: Taken[WorkItem]) -> None:
        try:
            await taken.ack()
        except BusUnreachable as error:
            # It comes again, and the receipts will tell that it is done.
            log.warning("could not acknowledge an item", error=str(error))

    @asynccontextmanager
    async def _heartbeat(self, taken: Taken[WorkItem]) -> AsyncIterator[None]:
        beating = asyncio.create_task(self._beat(taken), name="heartbeat")
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.wait({beating})

    async def _beat(self, taken: Taken[WorkItem]) -> None:
        while True:
            await asyncio.sleep(self._settings.ack_wait / 3)
            with suppress(BusUnreachable):
                await taken.working()


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


def _key(item: WorkItem) -> tuple[str, ...]:
    return (item.crash_id, item.destination, *(file.name for file in item.files))


def _text(error: BaseException) -> str:
    """Return an error as text that any message can carry, whatever was in it."""
    return str(error).encode("utf-8", "backslashreplace").decode()[:MAX_ERROR]
