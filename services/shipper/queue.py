"""How much lies in the work queue, for the metrics: what tells when more shippers are needed."""

import asyncio
from collections.abc import Iterable

import structlog

from crashbus.bus import Bus
from crashbus.errors import BusUnreachable
from crashbus.subjects import work_item_filter
from crashbus.work_queue import WorkQueue
from services.shipper import metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_EVERY = 10.0  # seconds; Prometheus seldom looks more often


async def watch(bus: Bus, destinations: Iterable[str]) -> None:
    """Look until cancelled, and tell by `metrics.QUEUE`."""
    filters = {work_item_filter(url, large): url for url in destinations for large in (False, True)}
    for url in filters.values():
        metrics.QUEUE.labels(url)  # there is a value before there is a bus
        for result in metrics.RESULTS:
            metrics.DELIVERIES.labels(url, result)
    queue = WorkQueue(bus)
    while True:
        try:
            items = dict.fromkeys(filters.values(), 0)
            for consumer in await queue.consumers():
                if consumer.filter in filters:
                    items[filters[consumer.filter]] += consumer.items
            for url, count in items.items():
                metrics.QUEUE.labels(url).set(count)
        except BusUnreachable as error:
            log.debug("cannot see how long the queue is", error=str(error))
        except Exception:
            log.exception("failed to look at the queue")
        await asyncio.sleep(LOOK_EVERY)
