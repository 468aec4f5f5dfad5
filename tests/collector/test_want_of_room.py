"""A spool that has too little room."""

import asyncio
import os
from pathlib import Path

from crashbus import DeadLetter, Manifest
from crashbus.layout import Kind, crash_file_name
from tests.collector.conftest import FILE, Setup, crash, fill_chunk_store
from tests.collector.stand_in import write_set
from tests.faults.ways import flipped
from tests.support.disk import small_disk
from tests.support.proxy import Proxy
from tests.support.records import EPOCH
from tests.support.wait import until

MIB = 1024 * 1024
CORE_AND_MORE = 300_000  # bytes: more than small files take, less than a core


async def start(setup: Setup, **settings: str) -> Path:
    """Let a process crash and its files wait; return their directory."""
    for name, value in settings.items():
        setup.collector._environment[f"CRASHBUS_COLLECTOR_{name.upper()}"] = value
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    process.wait()
    return setup.spool / str(process.pid)


async def without_core(directory: Path) -> set[str]:
    """Wait until the core is gone; return what is still there."""
    await until(lambda: directory.exists() and len(list(directory.iterdir())) == 3)
    return {path.name.partition("_")[0] for path in directory.iterdir()}


async def test_copy_of_a_core_that_lies_on_the_bus_goes_and_nothing_is_lost(setup: Setup) -> None:
    # By then all chunks are on the bus.
    directory = await start(setup, spool_bytes=str(CORE_AND_MORE), drop_after="10")
    assert await without_core(directory) == {"info", "cfg", "backtrace"}
    await until(
        lambda: setup.collector.metric("crashbus_collector_dropped_files_total") == 1, every=0.2
    )

    shipping = setup.shipper.start()
    await until(lambda: "manifest.json" in setup.shipper.names(FILE))

    (core,) = [name for name in setup.shipper.names(FILE) if name.startswith("core")]
    assert len(setup.shipper.content(FILE, core)) > CORE_AND_MORE
    # Everyone can see that the bus was all that held it.
    *_, manifest = await setup.bus.stored(Manifest)
    assert manifest.notes[-1].startswith(f"{core} was removed from its host for want of room")
    assert "the file is on the bus alone" in setup.collector.log
    assert await setup.bus.stored(DeadLetter) == []
    shipping.cancel()


class Flip:
    """Changes one bit of the first chunk of a core on its way."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, piece: bytes) -> bytes:
        if self.count or b"crash.chunk." not in piece or len(piece) < 4096:
            return piece
        self.count += 1
        return flipped(piece)


async def test_copy_stays_until_all_of_it_is_on_the_bus_as_it_was_sent(setup: Setup) -> None:
    way = Proxy(setup.nats.port)
    way.change_up = flip = Flip()
    setup.collector._environment["CRASHBUS_NATS_URL"] = f"nats://127.0.0.1:{way.port}"
    directory = await start(setup, spool_bytes=str(CORE_AND_MORE), drop_after="5")
    await until(lambda: list(directory.glob("core_*")))
    (core,) = directory.glob("core_*")
    content = core.read_bytes()

    await without_core(directory)

    assert flip.count == 1
    log = setup.collector.log
    assert 0 < log.index("chunks on the bus are damaged") < log.index("copy removed for room")
    shipping = setup.shipper.start()
    await until(lambda: "manifest.json" in setup.shipper.names(FILE))
    assert setup.shipper.content(FILE, core.name) == content
    assert await setup.bus.stored(DeadLetter) == []
    shipping.cancel()
    await asyncio.wait({shipping})
    await setup.collector.stop()
    way.close()


async def test_core_that_nothing_else_holds_is_told_when_it_is_dropped(setup: Setup) -> None:
    config = await fill_chunk_store(setup)
    shipping = setup.shipper.start()
    directory = await start(
        setup, spool_bytes=str(CORE_AND_MORE), drop_after="0", keep_delivered="0"
    )

    (letter,) = await until(lambda: setup.bus.stored(DeadLetter))
    assert letter.reason == "dropped_for_room"
    assert "CRASHBUS_COLLECTOR_SPOOL_BYTES" in letter.mend
    # The small files are delivered, and then nothing is left of it.
    await until(lambda: len(setup.shipper.names(FILE)) == 3)
    config.max_bytes = 64 * 1024**2
    await setup.bus._js.update_stream(config)
    await until(lambda: not directory.exists() and not setup.ledger())
    assert len(await setup.bus.stored(DeadLetter)) == 1
    shipping.cancel()
    await asyncio.wait({shipping})


async def test_delivered_crashes_go_first_when_they_take_too_much(setup: Setup) -> None:
    shipping = setup.shipper.start()
    directory = await start(setup, keep_delivered_bytes="1000")

    await until(lambda: not directory.exists() and not setup.ledger())

    assert "manifest.json" in setup.shipper.names(FILE)
    assert await setup.bus.stored(DeadLetter) == []
    shipping.cancel()
    await asyncio.wait({shipping})


async def test_disk_that_runs_full_costs_what_is_delivered_and_then_cores(
    setup: Setup, tmp_path: Path
) -> None:
    shipping = setup.shipper.start()
    with small_disk(tmp_path / "disk", 64) as disk:
        spool = disk.place / "appscope"
        spool.mkdir()
        setup.collector._environment |= {
            "CRASHBUS_SPOOL": str(spool),
            "CRASHBUS_COLLECTOR_DISK_RESERVE": "20",
            "CRASHBUS_COLLECTOR_DROP_AFTER": "0",
        }
        await setup.collector.start()
        first = spool / "1000001"
        write_set(spool, int(first.name), {Kind.INFO: b"x", Kind.CORE: os.urandom(8 * MIB)})
        await until(lambda: "manifest.json" in setup.shipper.names(FILE))
        assert first.exists()

        # Two MiB less than shall be free.
        disk.fill(leaving=11 * MIB)
        await until(lambda: not first.exists())
        assert await setup.bus.stored(DeadLetter) == []
        for _ in range(9):  # a store that is full, and large enough for the core
            await setup.bus.publish_raw("crash.chunk.filler.x", os.urandom(MIB - 4096))
        await fill_chunk_store(setup)
        second = spool / "1000002"
        write_set(spool, int(second.name), {Kind.INFO: b"x", Kind.CORE: os.urandom(8 * MIB)})

        (letter,) = await until(lambda: setup.bus.stored(DeadLetter))
        assert letter.reason == "dropped_for_room"
        await until(lambda: not list(second.glob("core_*")))
        info = FILE, crash_file_name(Kind.INFO, EPOCH)
        await until(lambda: setup.shipper.order.count(info) == 2)  # of each crash
        assert setup.collector.metric("crashbus_collector_dropped_files_total") == 1
        await setup.collector.stop()
    shipping.cancel()
    await asyncio.wait({shipping})
