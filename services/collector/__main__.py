"""The collector's start: wires its parts."""

import asyncio
from typing import Protocol

from crashbus import identity
from crashbus.bus import Bus
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
from services.common.bus_settings import BusSettings
from services.common.service import Runtime, run
from services.common.settings import SettingsError


class Part(Protocol):
    """What does its own share of the work."""

    async def run(self) -> None:
        """Do it until cancelled."""


async def work(runtime: Runtime, settings: CollectorSettings) -> None:
    """Gather and deliver until cancelled."""
    descriptors.raise_limit()  # each set inside a container is held open until it is whole
    ledger = await _ledger(runtime.bus_settings)
    async with runtime.bus(makes_streams=True) as bus:
        try:
            chunk_size(bus.max_payload)
        except ValueError as error:
            raise SettingsError(f"the NATS server takes too small messages: {error}") from error
        async with asyncio.TaskGroup() as tasks:
            for name, part in _parts(runtime, settings, bus, ledger).items():
                tasks.create_task(part.run(), name=name)


async def _ledger(shared: BusSettings) -> Ledger:
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
    return ledger


def _parts(
    runtime: Runtime, settings: CollectorSettings, bus: Bus, ledger: Ledger
) -> dict[str, Part]:
    """Return what runs until it is cancelled, by the names of the tasks."""
    host, recheck = runtime.host, settings.recheck
    spool, destinations = runtime.bus_settings.spool, runtime.bus_settings.destinations
    state = runtime.bus_settings.state / "collector"
    publisher = Publisher(bus, spool, settings.compression, settings.max_file_bytes)
    ahead = Ahead(bus, ledger, publisher, state / "ahead")
    cores = CoreStreams(spool, bus, ledger, publisher, state / "streamed")
    deliverer = Deliverer(host, bus, ledger, publisher, ahead, recheck)
    boot_id = identity.boot_id()
    entering = Entering(spool, host, boot_id, destinations, ledger, deliverer.start)
    gatherer = Gatherer(
        spool,
        host,
        boot_id,
        entering,
        bus,
        deliverer.start_ahead,
        runtime.ready,
        settings.recorder_patience,
    )
    return {
        "cores": cores,
        "gather": gatherer,
        "deliver": deliverer,
        "deaths": Deaths(host, destinations, bus, ledger, gatherer, state, settings.disk_reserve),
        "retention": Retention(str(spool), ledger, bus, deliverer, cores, settings),
        "late": Late(host, bus, ledger, ahead, cores, recheck),
        "failures": Failures(bus, ledger, recheck),
    }


def main() -> None:
    """Run the collector."""
    run("collector", CollectorSettings, work, lambda settings: settings.http)


if __name__ == "__main__":
    main()
