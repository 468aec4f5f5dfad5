"""The collector's start: wires its parts."""

import asyncio

from crashbus import identity
from crashbus.chunks import chunk_size
from services.collector.ahead import Ahead
from services.collector.core_streams import CoreStreams
from services.collector.deaths import Deaths
from services.collector.delivery import Deliverer
from services.collector.entering import Entering
from services.collector.failures import Failures
from services.collector.gather import Gatherer
from services.collector.late import Late
from services.collector.ledger import Ledger
from services.collector.publish import Publisher
from services.collector.retention import Retention
from services.collector.settings import CollectorSettings
from services.common import descriptors
from services.common.service import Runtime, run
from services.common.settings import SettingsError


async def work(runtime: Runtime, settings: CollectorSettings) -> None:
    """Gather and deliver until cancelled."""
    shared = runtime.bus_settings
    descriptors.raise_limit()  # each set inside a container is held open until it is whole
    if not shared.destinations:
        raise SettingsError(
            "CRASHBUS_DESTINATIONS is empty: say where crash files go, such as file:///var/crashes"
        )
    ledger = Ledger(shared.state / "collector")
    try:
        await asyncio.to_thread(ledger.load)
    except OSError as error:
        raise SettingsError(
            f"CRASHBUS_STATE: {shared.state} cannot be used: {error}; name a directory on a disk"
        ) from error
    async with runtime.bus(makes_streams=True) as bus:
        try:
            chunk_size(bus.max_payload)
        except ValueError as error:
            raise SettingsError(f"the NATS server takes too small messages: {error}") from error
        publisher = Publisher(
            bus,
            shared.spool,
            settings.compression,
            settings.max_file_bytes,
        )
        ahead = Ahead(bus, ledger, publisher, shared.state / "collector" / "ahead")
        deliverer = Deliverer(runtime.host, bus, ledger, publisher, ahead, settings.recheck)
        boot_id = identity.boot_id()
        entering = Entering(
            shared.spool, runtime.host, boot_id, shared.destinations, ledger, deliverer.start
        )
        gatherer = Gatherer(
            shared.spool,
            runtime.host,
            boot_id,
            entering,
            bus,
            deliverer.start_ahead,
            runtime.ready,
            settings.recorder_patience,
        )
        deaths = Deaths(
            runtime.host,
            shared.destinations,
            bus,
            ledger,
            gatherer,
            shared.state / "collector",
            settings.disk_reserve,
        )
        cores = CoreStreams(
            shared.spool, bus, ledger, publisher, shared.state / "collector" / "streamed"
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(cores.run(), name="cores")
            tasks.create_task(gatherer.run(), name="gather")
            tasks.create_task(deliverer.run(), name="deliver")
            tasks.create_task(deaths.run(), name="deaths")
            retention = Retention(str(shared.spool), ledger, bus, deliverer, cores, settings)
            tasks.create_task(retention.run(), name="retention")
            late = Late(runtime.host, bus, ledger, ahead, cores, settings.recheck)
            tasks.create_task(late.run(), name="late")
            failures = Failures(bus, ledger, settings.recheck)
            tasks.create_task(failures.run(), name="failures")


def main() -> None:
    """Run the collector."""
    run("collector", CollectorSettings, work, lambda settings: settings.http)


if __name__ == "__main__":
    main()
