"""Items that are given out twice, or after they were delivered."""

import os
from pathlib import Path

from crashbus import Bus, DeadLetter
from tests.shipper.conftest import (
    MIB,
    Absent,
    Running,
    nothing_left,
    quick,
    receipts_of,
    send,
    taking,
)
from tests.support.tcp import Receiver
from tests.support.wait import until


async def test_item_that_comes_after_its_receipt_is_done(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    """The collector purges chunks on a receipt; the shipper may die before it acknowledges."""
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(tmp_path.as_uri()))

    async with shipping([tmp_path.as_uri()]):
        await receipts_of(bus, sent, 1)
        await bus.purge_chunks(sent.crash_id, "info_1")
        await bus.publish(sent.item(tmp_path.as_uri()))
        await nothing_left(bus)

    assert await bus.stored(DeadLetter) == []


async def test_lines_are_not_sent_twice_when_only_the_acknowledgement_was_lost(
    bus: Bus, shipping: Running
) -> None:
    receiver = Receiver()
    sent = await send(bus, {"info_1": b"x"})
    item = sent.item(receiver.url)
    await bus.publish(item)
    async with shipping([receiver.url]):
        await receipts_of(bus, sent, 1)
        await nothing_left(bus)
    await bus.publish(item)
    async for taken in taking(bus, receiver.url):
        await taken.retry(0)  # as if a shipper had taken it and died
        break

    async with shipping([receiver.url]):
        await nothing_left(bus)
    receiver.close()

    assert receiver.accepted == 1


async def test_only_what_has_no_receipt_is_sent_again(bus: Bus, shipping: Running) -> None:
    receiver = Receiver()
    sent = await send(bus, {"cfg_1": b"1", "info_1": b"x"})
    await bus.publish(sent.item(receiver.url, "cfg_1"))
    async with shipping([receiver.url]):
        await receipts_of(bus, sent, 1)
        await nothing_left(bus)
    await bus.publish(sent.item(receiver.url))
    async for taken in taking(bus, receiver.url):
        await taken.retry(0)  # as if a shipper had died after the first of two receipts
        break

    async with shipping([receiver.url]):
        await receipts_of(bus, sent, 2)
        await nothing_left(bus)
    receiver.close()

    assert receiver.lines == [b'{"cfg_1":1}', b'{"info_1":["x"]}']


async def test_item_given_out_twice_holds_one_hand(bus: Bus, shipping: Running) -> None:
    receiver = Absent()
    place = f"{receiver.url}?core=true"
    sent = await send(bus, {"core_1": os.urandom(20 * MIB), "core_2": b"x"})
    patient = quick(concurrency=2, tcp_write_timeout=120)

    async with shipping([place], patient):
        await bus.publish(sent.item(place, "core_1"))
        await until(lambda: receiver.accepted == 1)
        await bus.publish(sent.item(place, "core_1"))
        await bus.publish(sent.item(place, "core_2"))
        (receipt,) = await receipts_of(bus, sent, 1, within=30)
        assert receipt.file.name == "core_2"
        receiver.back.set()
        await receipts_of(bus, sent, 2)
        await nothing_left(bus)

    assert receiver.accepted == 2, "the second copy found that all was done"
