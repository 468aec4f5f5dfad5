"""Destinations, files and buses in trouble: nothing is lost, and nobody else is kept waiting."""

import asyncio
import hashlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from crashbus import Bus, DeadLetter, Postponed, Receipt, streams
from crashbus.chunks import Chunk
from services.shipper.destinations.file import Upload
from services.shipper.hands import consumer
from tests.shipper.conftest import (
    MIB,
    Absent,
    Running,
    dead_letters,
    nothing_left,
    quick,
    receipts_of,
    send,
)
from tests.support.service import ServiceProcess
from tests.support.tcp import Receiver
from tests.support.wait import until

Start = Callable[..., Awaitable[ServiceProcess]]


async def test_error_of_our_own_is_told_and_does_not_end_the_service(
    bus: Bus, shipping: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Upload.replace

    def broken(self: Upload, name: str) -> None:
        if name.startswith("cfg"):
            raise ZeroDivisionError("a bug")
        whole(self, name)

    monkeypatch.setattr(Upload, "replace", broken)
    sent = await send(bus, {"cfg_1": b"x", "info_1": b"y"})
    await sent.offer(bus, tmp_path.as_uri())

    async with shipping([tmp_path.as_uri()], quick(retry_in_hand=0.1, give_up=0.5)):
        await receipts_of(bus, sent, 1)
        (letter,) = await dead_letters(bus)

    assert letter.reason == "internal_error"
    assert "ZeroDivisionError: a bug" in letter.error


async def test_dead_destination_does_not_keep_another_from_its_files(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    gone = Receiver()
    gone.close()
    sent = await send(bus, {f"info_{n}": b"x" for n in range(20)})
    await sent.offer(bus, gone.url)
    await sent.offer(bus, tmp_path.as_uri())

    async with shipping([gone.url, tmp_path.as_uri()], quick(retry_in_hand=0.5)):
        await receipts_of(bus, sent, 20)


async def test_items_of_a_dead_destination_stay_on_the_bus_and_stop_no_other(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    """More than a consumer may have out: each that is handed back for a while counts as out."""
    gone = Receiver()
    gone.close()
    sent = await send(bus, {f"info_{n}": b"x" for n in range(1100)})
    await sent.offer(bus, gone.url)
    settings = quick(concurrency=16, retry_in_hand=0, retry_first=100, retry_cap=100)

    async with shipping([gone.url, tmp_path.as_uri()], settings) as health:
        await until(lambda: f"destination {gone.url}" in health.faults())
        await bus.publish(sent.item(tmp_path.as_uri(), "info_0"))
        await receipts_of(bus, sent, 1, within=60)
        info = await bus._js.consumer_info(streams.FILES, consumer(gone.url))
        assert (info.num_ack_pending or 0) <= 2 * 16
        assert info.num_pending >= 1000


NOWHERE = "nowhere.invalid"  # RFC 2606


@pytest.mark.parametrize("scheme", ["tcp", "tls", "s3"])
@pytest.mark.parametrize(
    ("address", "reason"), [("127.0.0.1:{closed}", "refused"), (f"{NOWHERE}:1", "unknown_host")]
)
async def test_destination_that_is_not_there_at_the_start_keeps_its_items_and_shows(
    bus: Bus, shipper_process: Start, scheme: str, address: str, reason: str
) -> None:
    gone = Receiver()
    gone.close()
    address = address.format(closed=gone.port)
    url = "s3://bucket" if scheme == "s3" else f"{scheme}://{address}"
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(url))

    shipper = await shipper_process(
        [url],
        CRASHBUS_SHIPPER_RETRY_IN_HAND="0",
        CRASHBUS_SHIPPER_S3_ENDPOINT=f"http://{address}",
        CRASHBUS_SHIPPER_S3_ACCESS_KEY="key",
        CRASHBUS_SHIPPER_S3_SECRET_KEY="secret",
    )

    postponed = await until(lambda: bus.stored(Postponed))
    assert {one.reason for one in postponed} == {reason}
    assert f"destination {url}" in await until(lambda: asyncio.to_thread(shipper.faults))
    assert (await bus._js.stream_info(streams.FILES)).state.messages == 1
    assert await bus.stored(DeadLetter) == []
    assert "Traceback" not in shipper.log


async def test_health_is_well_when_a_destination_is_back_and_others_have_delivered_all(
    bus: Bus, shipping: Running
) -> None:
    gone = Receiver()
    gone.close()
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(gone.url))

    async with shipping([gone.url], quick(retry_in_hand=0)) as health:
        await until(lambda: f"destination {gone.url}" in health.faults())
        await bus._js.purge_stream(streams.FILES)  # as if another shipper had delivered it
        back = Receiver(port=gone.port)
        await until(lambda: not health.faults())
        back.close()

    assert await bus.stored(Receipt) == []


async def test_small_file_passes_while_every_hand_for_cores_is_taken(
    bus: Bus, shipping: Running
) -> None:
    receiver = Absent()
    place = f"{receiver.url}?core=true"
    sent = await send(bus, {"core_1": os.urandom(20 * MIB), "info_1": b"x"})
    await bus.publish(sent.item(place, "core_1"))
    patient = quick(concurrency=1, tcp_write_timeout=120)

    async with shipping([place], patient):
        await until(lambda: receiver.accepted == 1)
        await bus.publish(sent.item(place, "info_1"))
        (receipt,) = await receipts_of(bus, sent, 1)
        assert receipt.file.name == "info_1"
        receiver.back.set()
        await receipts_of(bus, sent, 2)


async def test_delivery_that_is_tried_again_later_is_told(bus: Bus, shipping: Running) -> None:
    gone = Receiver()
    gone.close()
    sent = await send(bus, {"info_1": b"x"})
    item = sent.item(gone.url)
    await bus.publish(item)

    async def told() -> list[Postponed]:
        return await bus.stored(Postponed, f"crash.postponed.web1.{sent.crash_id}.>")

    async with shipping([gone.url], quick(retry_in_hand=0, give_up=86400)):
        await until(told)
        await until(lambda: told_often(bus, streams.POSTPONED))
        (postponed,) = await told()

    assert (postponed.destination, postponed.files) == (gone.url, ("info_1",))
    assert postponed.reason == "refused"
    assert postponed.attempts >= 2
    assert postponed.given_up > postponed.next_try


async def told_often(bus: Bus, stream: str) -> bool:
    return (await bus._js.stream_info(stream)).state.last_seq >= 3


async def test_destinations_that_hang_take_no_thread_from_another(
    bus: Bus, shipper_process: Start, tmp_path: Path
) -> None:
    """A receiver that does not read holds a thread for each item in hand."""
    silent = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
    try:
        urls = [f"tcp://127.0.0.1:{one.getsockname()[1]}?core=true" for one in silent]
        shipper = await shipper_process([*urls, tmp_path.as_uri()])
        await shipper.healthy()
        sent = await send(bus, {f"core_{n}": os.urandom(20 * MIB) for n in range(4)}, "identity")
        for name in sent.contents:
            for url in urls:
                await bus.publish(sent.item(url, name))
        await until(lambda: shipper.metric("crashbus_shipper_items_in_hand") == 20)
        # All hang in sendall() then; what is sent no more says so.
        await until(lambda: is_still(lambda: shipper.metric("crashbus_shipper_bytes_in_total")))

        await bus.publish(sent.item(tmp_path.as_uri(), "core_1"))
        await receipts_of(bus, sent, 1, within=60)
    finally:
        for one in silent:
            one.close()


async def is_still(value: Callable[[], float]) -> bool:
    before = await asyncio.to_thread(value)
    await asyncio.sleep(1)
    return before == await asyncio.to_thread(value)


async def test_chunks_that_are_published_again_are_waited_for(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    sent = await send(bus, {"cfg_1": b"there", "info_1": b"x"}, encoding="identity")
    await bus.purge_chunks(sent.crash_id, "info_1")
    await bus.publish(sent.item(tmp_path.as_uri()))

    async with shipping([tmp_path.as_uri()], quick(source_patience=60)):
        (first,) = await receipts_of(bus, sent, 1)
        await until(lambda: deliveries(bus, consumer(tmp_path.as_uri()), 4))
        assert await bus.stored(DeadLetter) == []
        await bus.publish_chunk(
            sent.crash_id, "info_1", Chunk(0, 1, b"x", hashlib.sha256(b"x").hexdigest())
        )
        receipts = await receipts_of(bus, sent, 2)
        await nothing_left(bus)

    assert first.file.name == "cfg_1"
    assert sorted(one.file.name for one in receipts) == ["cfg_1", "info_1"]
    assert await bus.stored(DeadLetter) == []


async def deliveries(bus: Bus, durable: str, count: int) -> bool:
    """Tell whether a consumer has given out messages so often."""
    info = await bus._js.consumer_info(streams.FILES, durable)
    return info.delivered is not None and info.delivered.consumer_seq >= count


async def test_file_given_up_while_another_is_waited_for_is_told_once(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    sent = await send(bus, {"cfg_1": b"1", "info_1": b"x"})
    await bus.purge_chunks(sent.crash_id, "info_1")
    cfg, info = sent.files
    damaged = cfg.model_copy(update={"sha256": "0" * 64})
    await bus.publish(sent.item(tmp_path.as_uri(), files=(damaged, info)))

    async with shipping([tmp_path.as_uri()], quick(source_patience=2)):
        letters = await dead_letters(bus, 2)
        await nothing_left(bus)

    assert [letter.reason for letter in letters] == ["damaged_file", "chunks_missing"]
    assert [len(letter.work.files) for letter in letters if letter.work] == [1, 1]
    assert len(await bus.stored(DeadLetter)) == 2
