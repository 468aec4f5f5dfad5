"""Work items that are wrong, forged or for nobody, and sources that are not what they should be."""

import asyncio
import hashlib
import os
from pathlib import Path

import msgpack
import pytest
import zstandard

from crashbus import Bus, DeadLetter, WorkItem
from crashbus.chunks import Chunk
from tests.shipper.conftest import (
    MIB,
    Running,
    dead_letters,
    nothing_left,
    quick,
    receipts_of,
    send,
    taking,
)
from tests.support.wait import until


async def test_destination_of_no_setting_is_refused(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    sent = await send(bus, {"info_1": b"x"})
    item = sent.item(other.as_uri())
    await bus.publish(item)

    async with shipping([ours.as_uri()]):
        (letter,) = await dead_letters(bus)
        await nothing_left(bus)

    assert letter.reason == "destination_not_configured"
    assert letter.work == item
    assert "CRASHBUS_DESTINATIONS" in letter.mend
    assert not other.exists()


def forged(item: WorkItem, **changes: object) -> bytes:
    """Return the item as msgpack with fields that the class would not take."""
    data = msgpack.unpackb(item.encode())
    for name, value in changes.items():
        if name in data:
            data[name] = value
        else:
            data["files"][0][name] = value
    packed: bytes = msgpack.packb(data)
    return packed


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../etc/cron.d/x"},
        {"name": ".."},
        {"name": "a/b"},
        {"name": "a\0b"},
        {"crash_id": "../../../../root"},
        {"crash_id": "*"},
        {"chunks": -1},
        {"encoding": "exec"},
        {"crashed_at": float("nan")},
        {"crashed_at": 1e300},
        {"files": []},
        {"v": "9.0"},
    ],
    ids=str,
)
async def test_forged_work_item_is_put_aside_whole_and_counted(
    bus: Bus, shipping: Running, tmp_path: Path, changes: dict[str, object]
) -> None:
    base = tmp_path / "base"
    sent = await send(bus, {"info_1": b"x"})
    item = sent.item(base.as_uri())
    payload = forged(item, **changes)
    before = bus.malformed
    await bus.publish_raw(item.subject, payload)
    await bus.publish(item)

    async with shipping([base.as_uri()]):
        (letter,) = await dead_letters(bus)
        await receipts_of(bus, sent, 1)
        await nothing_left(bus)

    assert letter.reason == "malformed_message"
    assert letter.payload_received == payload
    assert bus.malformed == before + 1
    assert [one.name for one in tmp_path.iterdir() if one.name not in ("base", "nats")] == []


async def test_bytes_that_are_not_msgpack_are_put_aside(bus: Bus, shipping: Running) -> None:
    await bus.publish_raw("crash.file.web1.x", b"\xc1 not msgpack")

    async with shipping(["file:///nonexistent"]):
        (letter,) = await dead_letters(bus)

    assert (letter.reason, letter.payload_received) == ("malformed_message", b"\xc1 not msgpack")


async def test_hostile_text_stays_below_the_destination(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    sent = await send(bus, {"info_1": b"x"})
    item = sent.item(base.as_uri(), host="../../..", process_name="../../evil\0\n")
    await bus.publish(item)

    async with shipping([base.as_uri()]):
        (receipt,) = await receipts_of(bus, sent, 1)

    (file,) = (one for one in tmp_path.rglob("info_1*"))
    assert file.is_relative_to(base)
    assert receipt.url == file.as_uri()


async def test_chunk_that_is_not_what_was_sent_is_a_dead_letter(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    sent = await send(bus, {"core_1": os.urandom(3 * MIB)}, encoding="identity")
    await bus.purge_chunks(sent.crash_id, "core_1")
    body = os.urandom(1000)
    for index in range(sent.files[0].chunks):
        await bus.publish_chunk(sent.crash_id, "core_1", Chunk(index, 1000, body, "0" * 64))
    await bus.publish(sent.item(tmp_path.as_uri()))

    async with shipping([tmp_path.as_uri()]):
        (letter,) = await dead_letters(bus)

    assert letter.reason == "damaged_file"
    assert list(tmp_path.rglob("core_1*")) == []


async def test_frame_that_blows_up_is_a_dead_letter(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    sent = await send(bus, {"core_1": b"small"})
    await bus.purge_chunks(sent.crash_id, "core_1")
    bomb = zstandard.compress(bytes(1024 * MIB))
    await bus.publish_chunk(
        sent.crash_id, "core_1", Chunk(0, 5, bomb, hashlib.sha256(bomb).hexdigest())
    )
    await bus.publish(sent.item(tmp_path.as_uri()))

    async with shipping([tmp_path.as_uri()]):
        (letter,) = await dead_letters(bus)

    assert letter.reason == "damaged_file"


async def test_file_longer_than_announced_is_refused_as_soon_as_it_is(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    """What a destination holds in memory is bounded by what was announced."""
    sent = await send(bus, {"core_1": os.urandom(3 * MIB)}, encoding="identity")
    short = sent.files[0].model_copy(update={"size": 5, "stored_size": 5})
    await bus.publish(sent.item(tmp_path.as_uri(), files=(short,)))

    async with shipping([tmp_path.as_uri()]):
        (letter,) = await dead_letters(bus)

    assert letter.reason == "damaged_file"
    assert "more bytes came" in letter.error


async def test_chunks_that_never_came_are_a_dead_letter(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    sent = await send(bus, {"info_1": b"x"})
    await bus.purge_chunks(sent.crash_id, "info_1")
    await bus.publish(sent.item(tmp_path.as_uri()))

    async with shipping([tmp_path.as_uri()]):
        (letter,) = await dead_letters(bus)
        await nothing_left(bus)

    assert letter.reason == "chunks_missing"
    assert "collector" in letter.mend


async def test_consumer_of_former_versions_does_not_keep_work_back(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(tmp_path.as_uri()))
    async for taken in bus.consume(WorkItem, "shippers", service="test"):
        await taken.retry(0)
        break

    async with shipping([tmp_path.as_uri()]):
        await receipts_of(bus, sent, 1)
        await nothing_left(bus)


async def test_item_that_another_shipper_serves_is_left_to_it(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    theirs, nobodys = (tmp_path / "theirs").as_uri(), (tmp_path / "nobodys").as_uri()
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(theirs))
    async for taken in taking(bus, theirs):
        await taken.retry(3600)
        break
    item = sent.item(nobodys)
    await bus.publish(item)

    async with shipping([(tmp_path / "ours").as_uri()]):
        (letter,) = await dead_letters(bus)
        await until(lambda: not_held(bus, item))

    assert letter.work == item
    assert await bus.holds(WorkItem, sent.item(theirs).subject)
    assert len(await bus.stored(DeadLetter)) == 1


async def not_held(bus: Bus, item: WorkItem) -> bool:
    return not await bus.holds(WorkItem, item.subject)


async def test_item_on_a_subject_that_is_none_is_kept_as_malformed(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    sent = await send(bus, {"info_1": b"x"})
    item = sent.item(tmp_path.as_uri())
    await bus.publish_raw("crash.file.nonsense", item.encode())

    async with shipping([tmp_path.as_uri()]):
        (letter,) = await dead_letters(bus)
        await nothing_left(bus)

    assert (letter.reason, letter.payload_received) == ("malformed_message", item.encode())
    assert item.subject in letter.error


async def test_unclaimed_item_is_given_time(bus: Bus, shipping: Running, tmp_path: Path) -> None:
    """The shippers that serve it may just be starting."""
    late = (tmp_path / "late").as_uri()
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(late))

    async with shipping([(tmp_path / "ours").as_uri()], quick(unclaimed_after=60)):
        await asyncio.sleep(1)  # much less than its time, on a busy machine too
        async with shipping([late]):
            await receipts_of(bus, sent, 1)

    assert await bus.stored(DeadLetter) == []
