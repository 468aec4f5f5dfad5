"""What is removed from the bus takes no room there, and counts for none."""

import os

import pytest
from nats.aio.client import ServerVersion

from crashbus import Bus, removing, streams
from crashbus.chunks import Chunk

CRASH_ID, OTHER = "0" * 16, "1" * 16
SIZE = 100_000
COUNT = 40  # more than are removed at once


async def put(bus: Bus, crash_id: str, name: str, count: int = COUNT) -> None:
    for index in range(count):
        await bus.publish_chunk(crash_id, name, Chunk(index, 1, os.urandom(SIZE), ""))


async def counted(bus: Bus) -> int:
    """Return how many bytes the server holds to be stored; above its limit it takes no more."""
    return int((await bus._js.account_info()).storage)


async def test_what_is_removed_counts_no_more(bus: Bus) -> None:
    await put(bus, OTHER, "core_1", 1)
    before = await counted(bus)
    await put(bus, CRASH_ID, "core_1")
    assert await counted(bus) > before + COUNT * SIZE

    await bus.purge_chunks(CRASH_ID, "core_1")

    assert await bus.chunk_count(CRASH_ID, "core_1") == 0
    assert await bus.chunk_count(OTHER, "core_1") == 1
    assert await counted(bus) == before


async def test_all_of_a_crash_is_removed_and_nothing_of_another(bus: Bus) -> None:
    for crash_id in (CRASH_ID, OTHER):
        await put(bus, crash_id, "core_1", 3)
        await put(bus, crash_id, "info_1", 2)
        await bus._js.publish(f"crash.file.h.{crash_id}.info_1.x", b"an item")

    await bus.purge_crash(CRASH_ID)

    assert await bus.crashes_on_the_way("h") == {OTHER}
    assert (await bus._js.stream_info(streams.FILES)).state.messages == 1


@pytest.mark.parametrize("version", ["2.9.14", "2.9.15", "2.10.27", "2.12.0-RC.1"])
async def test_either_way_removes_the_same(bus: Bus, version: str) -> None:
    await put(bus, CRASH_ID, "core_1", 20)
    await put(bus, OTHER, "core_1", 1)
    subject = f"crash.chunk.{CRASH_ID}.>"

    await removing.remove(bus._js, ServerVersion(version), streams.CHUNKS, subject)

    assert await bus.crashes_on_the_way("h") == {OTHER}


async def test_nothing_to_remove_is_no_error(bus: Bus) -> None:
    await bus.purge_chunks(CRASH_ID, "core_1")
    await bus._js.delete_stream(streams.CHUNKS)
    await bus.purge_chunks(CRASH_ID, "core_1")
