"""The end of a delivery."""

import hashlib
import os
from pathlib import Path

from crashbus import Bus, connect
from crashbus.chunks import Verifier
from crashbus.layout import Kind
from services.collector.ledger import Source
from services.collector.publish import Publisher
from tests.collector.conftest import FILE, Delivering, reported_crash
from tests.support.nats import NatsServer


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
    verifier = Verifier(file.encoding)
    async for chunk in bus.chunks("0" * 16, "core_1", file.chunks):
        verifier.accept(chunk)
    verifier.finish(file.size, file.sha256)


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
