"""What a shipper does with its work, whatever happens to it."""

import asyncio
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgpack
import pytest
import zstandard

from crashbus import Bus, DeadLetter, Postponed, WorkItem, streams
from crashbus.bus import Delivery
from crashbus.chunks import Chunk
from crashbus.messages import work_item_filter
from services.shipper.destinations.file import Upload
from services.shipper.hands import consumer
from services.shipper.settings import ShipperSettings
from tests.shipper.conftest import (
    MIB,
    Running,
    dead_letters,
    nothing_left,
    quick,
    receipts_of,
    send,
)
from tests.support.nats import NatsServer
from tests.support.s3 import S3Server
from tests.support.service import ServiceProcess
from tests.support.tcp import Receiver
from tests.support.wait import until

Start = Callable[..., Awaitable[ServiceProcess]]


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


def taking(bus: Bus, url: str) -> AsyncIterator[Delivery[WorkItem]]:
    """Take a destination's items, as its shippers do."""
    return bus.consume(WorkItem, consumer(url), service="test", subject=work_item_filter(url))


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


async def test_error_of_our_own_is_told_and_does_not_end_the_service(
    bus: Bus, shipping: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Upload.complete

    def broken(self: Upload, name: str) -> None:
        if name.startswith("cfg"):
            raise ZeroDivisionError("a bug")
        whole(self, name)

    monkeypatch.setattr(Upload, "complete", broken)
    sent = await send(bus, {"cfg_1": b"x", "info_1": b"y"})
    for name in sent.contents:
        await bus.publish(sent.item(tmp_path.as_uri(), name))

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
    for name in sent.contents:
        await bus.publish(sent.item(gone.url, name))
    for name in sent.contents:
        await bus.publish(sent.item(tmp_path.as_uri(), name))

    async with shipping([gone.url, tmp_path.as_uri()], quick(retry_in_hand=0.5)):
        await receipts_of(bus, sent, 20)


async def test_items_of_a_dead_destination_stay_on_the_bus_and_stop_no_other(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    """More than a consumer may have out: each that is handed back for a while counts as out."""
    gone = Receiver()
    gone.close()
    sent = await send(bus, {f"info_{n}": b"x" for n in range(1100)})
    for name in sent.contents:
        await bus.publish(sent.item(gone.url, name))
    settings = quick(concurrency=16, retry_in_hand=0, retry_first=100, retry_cap=100)

    async with shipping([gone.url, tmp_path.as_uri()], settings) as health:
        await until(lambda: f"destination {gone.url}" in health.faults())
        await bus.publish(sent.item(tmp_path.as_uri(), "info_0"))
        await receipts_of(bus, sent, 1, within=60)
        info = await bus._js.consumer_info(streams.FILES, consumer(gone.url))
        assert (info.num_ack_pending or 0) <= 2 * 16
        assert info.num_pending >= 1000


class Absent(Receiver):
    """Takes nothing from its first connection before it is told to."""

    def __init__(self) -> None:
        self.back = threading.Event()
        super().__init__()

    def _read(self, connection: socket.socket) -> bytes | None:
        if connection is self._open[0]:
            self.back.wait()
        return super()._read(connection)


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


async def test_delivery_outlives_a_restart_of_the_bus(
    bus: Bus, shipping: Running, nats_server: NatsServer, tmp_path: Path
) -> None:
    sent = await send(bus, {"core_1": os.urandom(40 * MIB)}, encoding="identity")
    await bus.publish(sent.item(tmp_path.as_uri()))

    async with shipping([tmp_path.as_uri()]):
        await until(lambda: list(tmp_path.rglob(".crashbus-*")))
        nats_server.kill()
        await asyncio.sleep(0.3)  # an outage that lasts
        nats_server.start()
        await receipts_of(bus, sent, 1, within=60)

    assert (tmp_path / sent.folder / "core_1").read_bytes() == sent.contents["core_1"]


async def test_killed_shipper_leaves_its_work_to_another(
    bus: Bus, s3: S3Server, shipper_process: Start
) -> None:
    bucket = s3.make_bucket()
    sent = await send(bus, {"core_1": os.urandom(60 * MIB)}, encoding="identity")
    part = {"CRASHBUS_SHIPPER_S3_PART_SIZE": str(5 * MIB)}
    first = await shipper_process([f"s3://{bucket}"], **s3.settings(), **part)
    await first.healthy()
    await bus.publish(sent.item(f"s3://{bucket}"))
    await until(lambda: asyncio.to_thread(s3.unfinished_uploads, bucket), every=0.001)
    first.kill()

    second = await shipper_process([f"s3://{bucket}"], **s3.settings(), **part)
    (receipt,) = await receipts_of(bus, sent, 1, within=60)
    await nothing_left(bus)

    assert receipt.shipper == f"shipper-host/{second.pid}"
    assert s3.read(bucket, f"{sent.folder}/core_1") == sent.contents["core_1"]
    assert s3.unfinished_uploads(bucket) == []


async def test_shippers_share_the_work(bus: Bus, shipper_process: Start, tmp_path: Path) -> None:
    url = (tmp_path / "base").as_uri()
    shippers = [await shipper_process([url]) for _ in range(2)]
    for one in shippers:
        await one.healthy()
    sent = await send(bus, {f"info_{n}": os.urandom(1000) for n in range(60)})
    for name in sent.contents:
        await bus.publish(sent.item(url, name))

    receipts = await receipts_of(bus, sent, 60)
    await nothing_left(bus)

    assert sorted(receipt.file.name for receipt in receipts) == sorted(sent.contents)
    assert len({receipt.shipper for receipt in receipts}) == 2


async def test_sigterm_finishes_what_can_be_finished(
    bus: Bus, shipper_process: Start, tmp_path: Path
) -> None:
    url = (tmp_path / "base").as_uri()
    shipper = await shipper_process([url])
    await shipper.healthy()
    sent = await send(bus, {"core_1": os.urandom(60 * MIB)}, encoding="identity")
    await bus.publish(sent.item(url))
    await until(lambda: list((tmp_path / "base").rglob(".crashbus-*")), every=0.001)

    shipper.kill(signal.SIGTERM)

    assert await shipper.wait(60) == 0
    (receipt,) = await receipts_of(bus, sent, 1, within=1)
    assert receipt.attempts == 1
    await nothing_left(bus)


async def test_sigterm_hands_back_what_cannot_be_finished(
    bus: Bus, s3: S3Server, shipper_process: Start
) -> None:
    bucket = s3.make_bucket()
    url = f"s3://{bucket}"
    settings = {"CRASHBUS_SHIPPER_S3_PART_SIZE": str(5 * MIB), **s3.settings()}
    shipper = await shipper_process([url], CRASHBUS_SHIPPER_ACK_WAIT="180", **settings)
    await shipper.healthy()
    sent = await send(bus, {"core_1": os.urandom(60 * MIB)}, encoding="identity")
    await bus.publish(sent.item(url))
    await until(lambda: asyncio.to_thread(s3.unfinished_uploads, bucket), every=0.001)
    s3.pause_gateway()

    started = time.monotonic()
    shipper.kill(signal.SIGTERM)

    assert await shipper.wait(60) == 0, shipper.log
    assert time.monotonic() - started < 30
    assert "handed back" in shipper.log
    s3.resume_gateway()
    other = await shipper_process([url], CRASHBUS_SHIPPER_ACK_WAIT="180", **settings)
    (receipt,) = await receipts_of(bus, sent, 1, within=60)  # long before ack_wait is over
    assert receipt.shipper == f"shipper-host/{other.pid}"
    assert s3.unfinished_uploads(bucket) == []


async def test_start_without_bus_or_destination_warns_and_waits(
    nats_server: NatsServer, shipper_process: Start
) -> None:
    gone = Receiver()
    gone.close()
    nats_server.kill()
    shipper = await shipper_process([gone.url])

    await until(lambda: "cannot use a destination now" in shipper.log)
    await until(lambda: "waiting for the bus" in shipper.log)
    assert "start the receiver" in shipper.log
    assert "Traceback" not in shipper.log
    shipper.kill(signal.SIGTERM)
    assert await shipper.wait(60) == 0


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"CRASHBUS_DESTINATIONS": ""}, "CRASHBUS_DESTINATIONS"),
        ({"CRASHBUS_DESTINATIONS": "gopher://x"}, "s3://, tcp://, tls:// or file://"),
        ({"CRASHBUS_DESTINATIONS": "s3://abc"}, "CRASHBUS_SHIPPER_S3_ACCESS_KEY"),
        ({"CRASHBUS_SHIPPER_CONCURRENCY": "many"}, "CRASHBUS_SHIPPER_CONCURRENCY"),
        (
            {
                "CRASHBUS_DESTINATIONS": "tls://h:1",
                "CRASHBUS_SHIPPER_TLS_CA_FILE": "/nonexistent",
            },
            "CRASHBUS_SHIPPER_TLS_CA_FILE",
        ),
        ({"CRASHBUS_SHIPPER_S3_ENDPOINT": "localhost:9000"}, "http://host[:port]"),
    ],
)
async def test_wrong_setting_ends_it_with_status_2_and_the_mend(
    shipper_process: Start, variables: dict[str, str], told: str
) -> None:
    shipper = await shipper_process(["file:///tmp"], **variables)

    assert await shipper.wait(60) == 2
    assert told in shipper.log
    assert "Traceback" not in shipper.log


async def test_secrets_are_read_from_files_and_never_logged(
    bus: Bus, s3: S3Server, shipper_process: Start, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{s3.secret_key}\n")
    settings = s3.settings()
    del settings["CRASHBUS_SHIPPER_S3_SECRET_KEY"]
    bucket = s3.make_bucket()
    shipper = await shipper_process(
        [f"s3://{bucket}"], CRASHBUS_SHIPPER_S3_SECRET_KEY_FILE=str(secret), **settings
    )
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(f"s3://{bucket}"))

    await receipts_of(bus, sent, 1)

    assert s3.secret_key not in shipper.log
    assert shipper.metric("crashbus_shipper_deliveries_total") == 1


def test_settings_hide_secrets() -> None:
    assert "hush" not in repr(ShipperSettings(s3_secret_key="hush"))  # type: ignore[arg-type]


async def test_memory_does_not_grow_with_the_file(
    bus: Bus, s3: S3Server, shipper_process: Start
) -> None:
    bucket = s3.make_bucket()
    shipper = await shipper_process([f"s3://{bucket}"], **s3.settings())
    await shipper.healthy()
    sent = await send(bus, {f"core_{n}": os.urandom(30 * MIB) for n in range(4)}, "identity")
    for name in sent.contents:
        await bus.publish(sent.item(f"s3://{bucket}", name))

    await receipts_of(bus, sent, 4, within=60)

    status = Path(f"/proc/{shipper.pid}/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
    assert peak < 120, f"{peak} MiB"
