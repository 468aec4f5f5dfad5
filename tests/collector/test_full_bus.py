"""A bus that has no room for cores."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from crashbus import Bus, Receipt, WorkItem, streams
from crashbus.chunks import Encoder, chunk_size
from crashbus.errors import BusFull
from crashbus.identity import crash_id
from crashbus.layout import Kind, crash_file_name
from services.collector import delivery, metrics, sending
from services.collector.ledger import Crash, Source
from services.collector.sending import Sending
from tests.collector.conftest import FILE, Delivering, reported_crash
from tests.collector.stand_in import StandInShipper
from tests.support.nats import stored
from tests.support.wait import until

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second where it is half a minute."""
    monkeypatch.setattr(sending, "FULL_PATIENCE", 0.2)
    monkeypatch.setattr(sending, "TRY_AGAIN", 0.02)
    monkeypatch.setattr(delivery, "GIVE_WAY", 0.1, raising=False)
    monkeypatch.setattr(delivery, "TRY_AGAIN", 0.1)


async def have_room(bus: Bus, size: int, stream: str = streams.CHUNKS) -> None:
    info = await bus._js.stream_info(stream)
    info.config.max_bytes = size
    await bus._js.update_stream(info.config)


def with_core(own: Delivering, number: int, size: int) -> Crash:
    """Return a crash of which nothing but a core of noise is left to deliver."""
    return with_file(own, number, size, Kind.CORE)


def with_file(own: Delivering, number: int, size: int, kind: Kind) -> Crash:
    directory, name = own.directory / str(number), crash_file_name(kind, 1)
    directory.mkdir()
    (directory / name).write_bytes(os.urandom(size))
    source = Source(directory=directory.name, name=name, kind=kind)
    crash = reported_crash(source)
    crash.host, crash.crash_id = own.host, crash_id(crash.process.boot_id, number, 1)
    return crash


@asynccontextmanager
async def at_work(*all_of_them: Delivering) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(own.deliverer.run()) for own in all_of_them]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_half_a_file_that_waited_for_room_in_vain_is_taken_back(bus: Bus) -> None:
    await have_room(bus, 3 * MIB)
    without_room = set[str]()
    sending = Sending(bus, "0" * 16, "core_1", without_room)
    encoder = Encoder(chunk_size(bus.max_payload), "identity")
    packed = encoder.packer.pack(os.urandom(encoder.range_size))

    with pytest.raises(BusFull):
        for _ in range(20):
            for chunk in encoder.number(packed):
                await sending.send(chunk)
            if without_room:
                assert await bus.chunk_count("0" * 16, "core_1") > 0
        await sending.flush()

    assert await bus.chunk_count("0" * 16, "core_1") == 0
    assert without_room == set()


async def test_file_that_finds_room_in_time_goes_on_where_it_was(bus: Bus) -> None:
    await have_room(bus, 3 * MIB)
    refused = metrics.BUS_FULL._value.get()
    sending = Sending(bus, "0" * 16, "core_1", set())
    encoder = Encoder(chunk_size(bus.max_payload), "identity")

    async def send() -> None:
        for _ in range(6):
            for chunk in encoder.number(encoder.packer.pack(os.urandom(encoder.range_size))):
                await sending.send(chunk)
        await sending.flush()

    task = asyncio.create_task(send())
    await until(lambda: metrics.BUS_FULL._value.get() > refused, every=0.01)
    await have_room(bus, 64 * MIB)
    await task

    assert [one.index async for one in bus.chunks("0" * 16, "core_1", 6)] == [*range(6)]


async def test_cores_that_wait_for_room_keep_their_order(bus: Bus, tmp_path: Path) -> None:
    await have_room(bus, 2 * MIB)
    own = Delivering(bus, tmp_path)
    crashes = [with_core(own, number, 3 * MIB // 2) for number in (1, 2, 3)]
    (tmp_path / "1" / "core_1").write_bytes(os.urandom(5 * MIB // 4))
    await bus.publish_raw("crash.chunk.filler.x", os.urandom(MIB - 4096))
    given_up = list[str]()
    keep_first = own.deliverer._cores.keep_first

    def note(crash_id: str) -> None:
        given_up.append(crash_id)
        keep_first(crash_id)

    own.deliverer._cores.keep_first = note  # type: ignore[method-assign]
    async with at_work(own):
        for crash in crashes:
            await own.ledger.save(crash)
            own.deliverer.start(crash)
        await until(lambda: len(given_up) > 1, every=0.01)
        await have_room(bus, 64 * MIB)
        items = await stored(bus, WorkItem, len(crashes))

    assert set(given_up) == {crashes[0].crash_id}
    assert [item.crash_id for item in items] == [crash.crash_id for crash in crashes]


async def test_two_collectors_with_half_a_core_each_both_come_to_an_end(
    bus: Bus, tmp_path: Path
) -> None:
    """There is room for one of the cores and half of the other."""
    await have_room(bus, 9 * MIB)
    collectors = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        own = Delivering(bus, tmp_path / str(number), f"host-{number}")
        crash = with_core(own, number, 6 * MIB)
        await own.ledger.save(crash)
        collectors.append(own)
    shipper = StandInShipper(bus)
    shipping = shipper.start()
    async with at_work(*collectors):
        receipts = await stored(bus, Receipt, 2, within=30)
        assert {one.destination for one in receipts} == {FILE}
    shipping.cancel()
    await asyncio.wait({shipping})


async def test_small_files_without_room_do_not_stop_the_crash_that_makes_room(
    bus: Bus, tmp_path: Path
) -> None:
    """As many as there are workers wait for what the chunks of a delivered file still take."""
    own, delivered = Delivering(bus, tmp_path), reported_crash()
    source = Source(directory="1", name="info_1", kind=Kind.INFO, delivered=[FILE])
    content = os.urandom(MIB // 2)
    source.file = await own.publisher.publish_bytes(delivered.crash_id, source, content)
    delivered.sources, delivered.reported = {source.name: source}, (source.name,)
    await have_room(bus, 3 * MIB // 4, streams.SMALL_CHUNKS)
    waiting = [
        with_file(own, number, MIB // 2, Kind.INFO) for number in range(2, 2 + delivery.SMALL_LANES)
    ]
    shipping = (shipper := StandInShipper(bus)).start()
    async with at_work(own):
        for crash in (*waiting, delivered):
            await own.ledger.save(crash)
            own.deliverer.start(crash)
        await until(lambda: len(shipper.names(FILE)) > 0, within=20)
        await stored(bus, Receipt, len(waiting), within=30)
    shipping.cancel()
    await asyncio.wait({shipping})
