"""``python -m services.shipper``: wires the shipper's parts."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import structlog

from services.common.service import Runtime, run
from services.common.settings import SettingsError
from services.shipper.delivery import Courier
from services.shipper.failure import Failure
from services.shipper.place import Place
from services.shipper.settings import ShipperSettings
from services.shipper.shipper import Shipper

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SPARE_THREADS = 4  # for what is no delivery
TIDY_EVERY = 3600.0  # seconds
CHECK_AGAIN = 10.0  # seconds between looks at a destination that cannot be used


async def work(runtime: Runtime, settings: ShipperSettings) -> None:
    """Ship until cancelled.

    Raises:
        SettingsError: no destination is configured, or one lacks a setting.
    """
    places = places_of(runtime, settings)
    threads = threads_for(len(places), settings)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))
    checks = [asyncio.create_task(look_after(place)) for place in places.values()]
    try:
        async with runtime.bus() as bus:
            runtime.ready()
            name = f"{runtime.host}/{os.getpid()}"
            courier = Courier(bus, places, settings, name)
            await Shipper(bus, courier, settings, places, runtime.host).run()
    finally:
        for check in checks:
            check.cancel()


def places_of(runtime: Runtime, settings: ShipperSettings) -> dict[str, Place]:
    """Return what delivers to each configured destination, by URL."""
    urls = runtime.bus_settings.destinations
    if not urls:
        raise SettingsError(
            "CRASHBUS_DESTINATIONS: no destination is set, such as s3://crashes/prefix, "
            "tcp://collector.example:10060 or file:///var/crash/delivered"
        )
    return {url: Place.at(url, settings, runtime.health) for url in urls}


def threads_for(places: int, settings: ShipperSettings) -> int:
    """Return how many threads are needed at most.

    asyncio's own few would all be taken by destinations that hang, and the others would wait.
    Each hand may hold one with its destination while another checks a chunk.
    """
    hands = 2 * settings.concurrency  # for small files and for large ones
    return SPARE_THREADS + places * (2 * hands + 1)  # 1: for the look at the start


async def look_after(place: Place) -> None:
    """See that a destination can be used, and that nothing gathers there."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch(place), name="watch")
        tasks.create_task(tidy(place), name="tidy")


async def watch(place: Place) -> None:
    """Look at a destination at the start, so that trouble shows before the first crash; and while
    health complains of it, since it may be well again and there may be nothing to deliver.
    """
    is_known = False
    while True:
        # An open circuit has its own looks.
        if not is_known or (place.standing.is_told and not place.standing.is_open):
            is_known = await look(place)
        await asyncio.sleep(CHECK_AGAIN)


async def look(place: Place) -> bool:
    """Look at a destination; tell whether it can be used."""
    try:
        await place.deliverer.check()
    except Failure as failure:
        log.warning(
            "cannot use a destination now, trying on",
            destination=place.url,
            error=str(failure),
            mend=failure.mend,
        )
        place.standing.looked_at(failure)
        return False
    except Exception:
        log.exception("cannot look at a destination", destination=place.url)
        return True  # deliveries will tell how it does
    place.standing.looked_at(None)
    log.info("destination is ready", destination=place.url)
    return True


async def tidy(place: Place) -> None:
    """Remove from a destination, from time to time, what dead shippers left there."""
    while True:
        try:
            await place.deliverer.tidy()
        except Failure as failure:
            log.warning("cannot tidy a destination", destination=place.url, error=str(failure))
        except Exception:
            log.exception("cannot tidy a destination", destination=place.url)
        await asyncio.sleep(TIDY_EVERY)


def main() -> None:
    """Run the shipper."""
    run("shipper", ShipperSettings, work, lambda settings: settings.http)


if __name__ == "__main__":
    main()
