"""What comes back for this host's crashes: receipts, dead letters, and requests to try again."""

from collections.abc import AsyncIterator, Callable

import structlog

from crashbus.bus import Bus
from crashbus.consuming import Delivery
from crashbus.errors import BusFull, BusUnreachable
from crashbus.layout import LARGE, Kind
from crashbus.messages import DeadLetter, Receipt, Replay
from crashbus.names import token
from services.collector import metrics
from services.collector.ledger import Crash, Ledger
from services.collector.plan import apply_failure, apply_receipt
from services.collector.replay import apply_replay, gone

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Answer = Receipt | DeadLetter | Replay


class Answers:
    """Enters in the ledger what comes.

    Args:
        changed: told of each crash whose entry is another then.
    """

    def __init__(
        self, host: str, bus: Bus, ledger: Ledger, changed: Callable[[Crash], None]
    ) -> None:
        self._host = host
        self._bus = bus
        self._ledger = ledger
        self._changed = changed

    async def take(self, kind: type[Answer]) -> None:
        """Apply those of one kind as they come, until cancelled."""
        place = kind.SUBJECT.split(".")[1]
        durable = f"collector-{place}-{token(self._host)}"
        subject = f"crash.{place}.{token(self._host)}.>"
        deliveries: AsyncIterator[Delivery[Answer]] = self._bus.consume(
            kind, durable, service="collector", subject=subject, batch=64
        )
        async for delivery in deliveries:
            try:
                await self._apply(delivery.message)
                await delivery.ack()
            except (BusUnreachable, BusFull, OSError) as error:
                log.warning("receipt will come again", error=str(error))
            except Exception:  # it comes again, too; one odd message must not end the rest
                metrics.FAULTS.labels("receipts").inc()
                log.exception("cannot apply a message", kind=kind.__name__)

    async def _apply(self, message: Answer) -> None:
        crash = self._ledger.get(message.crash_id) if message.crash_id else None
        if crash is None:
            if isinstance(message, Replay):
                await self._bus.publish(gone(message))
        elif crash.delivered_at is None and _enter(crash, message):
            await self._ledger.save(crash)
            self._changed(crash)


def _enter(crash: Crash, message: Answer) -> bool:
    """Tell whether it says anything new."""
    if isinstance(message, Replay):
        return apply_replay(crash, message)
    if isinstance(message, DeadLetter):
        return apply_failure(crash, message)
    is_new = apply_receipt(crash, message)
    if is_new:
        _tell_latency(crash, message)
    return is_new


def _tell_latency(crash: Crash, receipt: Receipt) -> None:
    kind = receipt.file.kind
    part = "whole" if kind is Kind.MANIFEST else "large" if kind in LARGE else "small"
    metrics.LATENCY.labels(part).observe(max(0.0, receipt.time - crash.crashed_at))
