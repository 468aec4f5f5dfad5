"""The end of a delivery."""

import asyncio
import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import Gauge

from crashbus import Bus, WorkItem, chunks, connect
from crashbus.chunks import Chunk, Packer, Verifier, _Zeros
from crashbus.layout import Kind, crash_file_name
from crashbus.message_base import Message
from services.collector import metrics
from services.collector.ledger import Crash, Source
from services.collector.publish import Publisher
from services.collector.sending import Sending
from tests.collector.conftest import FILE, Delivering, reported_crash
from tests.support.nats import NatsServer, stored
from tests.support.records import EPOCH
from tests.support.wait import until


async def test_crash_that_is_delivered_leaves_no_chunk_on_the_bus(bus: Bus, tmp_path: Path) -> None:
    """The last receipt may come while the crash's end is being looked at."""
    own, crash = Delivering(bus, tmp_path), reported_crash()
    source = Source(directory="0", name="manifest.json", kind=Kind.MANIFEST, delivered=[FILE])
    source.file = await own.publisher.publish_bytes(crash.crash_id, source, b"{}")
    crash.manifest = source
    assert await bus.chunk_count(crash.crash_id, source.name) == 1

    await own.deliverer._ending._finish(crash)

    assert crash.delivered_at is not None
    assert await bus.chunk_count(crash.crash_id, source.name) == 0


async def test_chunks_are_as_large_as_the_server_takes_them(tmp_path: Path) -> None:
    directory = tmp_path / "nats"
    directory.mkdir()
    server = NatsServer(directory, "max_payload: 8388608\n")
    server.start()
    try:
        async with connect(server.url) as bus:
            await bus.ensure_streams()
            (tmp_path / "7").mkdir()
            content = os.urandom(20_000_000)
            (tmp_path / "7" / "core_1").write_bytes(content)
            publisher = Publisher(bus, tmp_path, 1, 1 << 40)
            source = Source(directory="7", name="core_1", kind=Kind.CORE)

            file = await publisher.publish("0" * 16, source)

            assert file.chunks == 3
            verifier = Verifier(file.encoding)
            chunks = bus.chunks("0" * 16, "core_1", file.chunks)
            assert b"".join([verifier.accept(one) async for one in chunks]) == content
    finally:
        server.stop()


async def test_file_that_grows_while_it_is_read_is_what_it_was_when_it_was_judged(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever owns it could have it read without end."""
    (tmp_path / "7").mkdir()
    content, core, send = os.urandom(5_000_000), tmp_path / "7" / "core_1", Sending.send
    core.write_bytes(content)

    async def growing(sending: Sending, chunk: Chunk) -> None:
        with core.open("ab") as file:
            file.write(bytes(1_000_000))
        await send(sending, chunk)

    monkeypatch.setattr(Sending, "send", growing)
    publisher = Publisher(bus, tmp_path, 1, 1 << 40)
    file = await publisher.publish("0" * 16, Source(directory="7", name="core_1", kind=Kind.CORE))

    assert core.stat().st_size > len(content)
    assert (file.size, file.truncated) == (len(content), False)
    assert file.sha256 == hashlib.sha256(content).hexdigest()


async def test_holes_of_a_core_cost_next_to_nothing(bus: Bus, tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    size, expected = 200_000_001, hashlib.sha256()
    with (tmp_path / "7" / "core_1").open("w+b") as core:
        core.truncate(size)
        for place in (5_000, 90_000_000, size - 3):
            core.seek(place)
            core.write(b"abc")
        core.seek(0)
        while block := core.read(1 << 20):
            expected.update(block)
    publisher = Publisher(bus, tmp_path, 1, 1 << 40)

    file = await publisher.publish("0" * 16, Source(directory="7", name="core_1", kind=Kind.CORE))

    assert (file.size, file.sha256) == (size, expected.hexdigest())
    assert file.stored_size < size / 10_000
    assert file.chunks < size / 5_000_000  # nothing but zeros travels in larger ranges
    verifier = Verifier(file.encoding)
    async for chunk in bus.chunks("0" * 16, "core_1", file.chunks):
        verifier.accept(chunk)
    verifier.finish(file.size, file.sha256)


async def test_zeros_are_packed_once_for_all_cores_and_never_on_the_event_loop(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "7").mkdir()
    make, threads = Packer._make_zeros, list[int]()

    def noted(packer: Packer) -> _Zeros:
        threads.append(threading.get_ident())
        return make(packer)

    monkeypatch.setattr(Packer, "_make_zeros", noted)
    monkeypatch.setattr(chunks, "_made", {})
    publisher = Publisher(bus, tmp_path, 1, 1 << 40)
    for number, content in enumerate((b"", os.urandom(5_000_000), bytes(50_000_000))):
        (tmp_path / "7" / f"core_{number}").write_bytes(content)
        source = Source(directory="7", name=f"core_{number}", kind=Kind.CORE)
        await publisher.publish(str(number) * 16, source)

    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


async def test_file_that_is_cut_tells_what_it_would_be(bus: Bus, tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "core_1").write_bytes(bytes(5000))
    source = Source(directory="7", name="core_1", kind=Kind.CORE)

    cut = await Publisher(bus, tmp_path, 1, 3000).publish("0" * 16, source)
    assert (cut.size, cut.truncated, cut.expected_size) == (3000, True, 5000)

    source.note, source.expected = "cut short by the recorder", 7000
    short = await Publisher(bus, tmp_path, 1, 1 << 40).publish("1" * 16, source)
    assert (short.size, short.truncated, short.expected_size) == (5000, True, 7000)

    source.note, source.expected = None, None
    whole = await Publisher(bus, tmp_path, 0, 1 << 40).publish("2" * 16, source)
    assert (whole.truncated, whole.expected_size, whole.encoding) == (False, None, "identity")


IN_ORDER = (Kind.INFO, Kind.BACKTRACE, Kind.BACKTRACE_JSON, Kind.SNAPSHOT, Kind.CFG, Kind.CORE)


def crash_of_all_kinds(own: Delivering) -> Crash:
    """Return a crash that has a file of each kind, the last one first."""
    (own.directory / "7").mkdir()
    sources = []
    for kind in reversed(IN_ORDER):
        source = Source(directory="7", name=crash_file_name(kind, EPOCH), kind=kind)
        (own.directory / "7" / source.name).write_bytes(kind.encode())
        sources.append(source)
    return reported_crash(*sources)


async def kinds_offered(bus: Bus) -> list[Kind]:
    """Return the kinds of the files of all work items, in the order of the stream."""
    items = await stored(bus, WorkItem, len(IN_ORDER))
    return [file.kind for item in items for file in item.files]


async def test_files_are_offered_in_shipping_order_also_when_one_takes_long(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Delivering(bus, tmp_path)
    crash = crash_of_all_kinds(own)
    publish, slow = bus.publish, [Kind.INFO, Kind.SNAPSHOT]

    async def publish_slowly(message: Message) -> None:
        if isinstance(message, WorkItem) and message.files[0].kind in slow:
            await asyncio.sleep(0.1)  # as if its first answer had been lost
        await publish(message)

    monkeypatch.setattr(bus, "publish", publish_slowly)
    delivering = asyncio.create_task(own.deliverer.run())
    await own.ledger.save(crash)
    own.deliverer.start(crash)

    assert await kinds_offered(bus) == [*IN_ORDER]
    delivering.cancel()
    await asyncio.wait({delivering})


async def test_core_that_was_sent_ahead_is_offered_after_the_small_files(
    bus: Bus, tmp_path: Path
) -> None:
    """Its lane may come to it in the moment in which its crash is entered."""
    own = Delivering(bus, tmp_path)
    crash = crash_of_all_kinds(own)
    await own.ledger.save(crash)
    cores, small = own.deliverer._cores, own.deliverer._small

    for lane in (cores, small, cores):
        await own.deliverer._deliver(lane, crash.crash_id)

    assert await kinds_offered(bus) == [*IN_ORDER]


def value_of(metric: Gauge) -> float:
    (found,) = metric.collect()
    return found.samples[0].value


async def test_what_failed_for_good_is_not_told_as_waiting(bus: Bus, tmp_path: Path) -> None:
    """An alert on it would fire for as long as the files are kept."""
    own = Delivering(bus, tmp_path)
    failed = Source(directory="1", name="info_1", kind=Kind.INFO, failed={FILE: "refused"})
    waiting = Source(directory="2", name="info_2", kind=Kind.INFO)
    of_failed = reported_crash(failed)
    of_waiting = reported_crash(waiting).model_copy(
        update={"crash_id": "0" * 16, "crashed_at": time.time() - 10}
    )
    for crash in (of_failed, of_waiting):
        await own.ledger.save(crash)
    metrics.UNDELIVERED.set(-1)

    task = asyncio.create_task(own.deliverer._rechecks())
    await until(lambda: value_of(metrics.UNDELIVERED) >= 0)
    task.cancel()

    assert value_of(metrics.UNDELIVERED) == 1
    assert 10 <= value_of(metrics.OLDEST_UNDELIVERED) < 100
