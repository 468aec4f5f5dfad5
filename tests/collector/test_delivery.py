"""The end of a delivery."""

from pathlib import Path

from crashbus import Bus
from crashbus.layout import Kind
from services.collector.ahead import Ahead
from services.collector.delivery import Deliverer
from services.collector.ledger import Crash, Ledger, Source
from services.collector.publish import Publisher
from tests.collector.stand_in import signal_event

FILE = "file:///delivered"


async def test_crash_that_is_delivered_leaves_no_chunk_on_the_bus(bus: Bus, tmp_path: Path) -> None:
    """The last receipt may come while the crash's end is being looked at."""
    ledger = Ledger(tmp_path / "ledger")
    ledger.load()
    publisher = Publisher(bus, tmp_path, 1, 1 << 30)
    ahead = Ahead(bus, ledger, publisher, tmp_path / "ahead")
    deliverer = Deliverer("test-host", bus, ledger, publisher, ahead, 60)
    event = signal_event(1)
    crash = Crash(
        crash_id=event.crash_id,
        host="test-host",
        crashed_at=1.0,
        process=event.process,
        destinations=(FILE,),
        reported=(),
    )
    source = Source(directory="0", name="manifest.json", kind=Kind.MANIFEST, delivered=[FILE])
    source.file = await publisher.publish_bytes(crash.crash_id, source, b"{}")
    crash.manifest = source
    assert await bus.chunk_count(crash.crash_id, source.name) == 1

    await deliverer._finish(crash)

    assert crash.delivered_at is not None
    assert await bus.chunk_count(crash.crash_id, source.name) == 0
