"""A destination's disk hangs, and the shipper with it as little as can be."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from nats.aio.msg import Msg

from crashbus import Bus, streams
from tests.shipper.conftest import MIB, nothing_left, receipts_of, send
from tests.support.disk import small_disk
from tests.support.service import ServiceProcess
from tests.support.wait import until

Start = Callable[..., Awaitable[ServiceProcess]]

BEATS = 4  # in-progress acknowledgements: three of them last as long as an item may be silent


async def test_item_on_a_disk_that_hangs_is_kept_in_hand_and_all_others_go_on(
    bus: Bus, shipper_process: Start, tmp_path: Path
) -> None:
    beats: list[bytes] = []

    async def note(message: Msg) -> None:
        beats.extend([message.data] if message.data == b"+WPI" else [])

    await bus._client.subscribe(f"$JS.ACK.{streams.FILES}.>", cb=note)
    with small_disk(tmp_path / "disk", 64) as disk:
        hangs, works = disk.place.as_uri(), (tmp_path / "works").as_uri()
        shipper = await shipper_process([hangs, works])
        await shipper.healthy()
        sent = await send(bus, {"core_1": os.urandom(4 * MIB)}, "identity")
        with disk.hanging():
            await bus.publish(sent.item(hangs))
            await until(shipper.hanging_threads)
            await bus.publish(sent.item(works))
            (receipt,) = await receipts_of(bus, sent, 1)
            assert receipt.destination == works
            beats.clear()
            await until(lambda: len(beats) >= BEATS)
            # Any thread waits for a disk now and then, but only one for this disk all the time.
            await until(lambda: shipper.pid not in shipper.hanging_threads())
            assert shipper.hanging_threads()

        await nothing_left(bus)

        receipts = await receipts_of(bus, sent, 2)
        assert [(one.destination, one.attempts) for one in receipts] == [(works, 1), (hangs, 1)]
        (stored,) = disk.place.rglob("core_1")
        assert stored.read_bytes() == sent.contents["core_1"]
        await shipper.stop()
