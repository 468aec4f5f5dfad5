"""Uploads that were begun by a shipper that is no more, at a real S3 server."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest
from minio.datatypes import Part

from crashbus import Bus
from services.shipper.destinations.s3_api import S3Api
from services.shipper.destinations.s3_upload import remove_unfinished
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
from tests.shipper.slow_way import SlowWay, slow_way
from tests.support.proxy import Proxy
from tests.support.s3 import S3Server
from tests.support.service import ServiceProcess
from tests.support.wait import until

Start = Callable[..., Awaitable[ServiceProcess]]

PART = 5 * MIB
PARTS = 8


def stored_parts(s3: S3Server, bucket: str, key: str) -> list[Part]:
    """Return the parts of the one unfinished upload to a key; none where there is none."""
    client = s3.client()
    uploads = client._list_multipart_uploads(bucket).uploads
    if not uploads:
        return []
    return list(client._list_parts(bucket, key, str(uploads[0].upload_id)).parts)


def settings_for(s3: S3Server, way: SlowWay) -> dict[str, str]:
    return {
        **s3.settings(),
        "CRASHBUS_SHIPPER_S3_ENDPOINT": way.endpoint,
        "CRASHBUS_SHIPPER_S3_PART_SIZE": str(PART),
    }


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_upload_of_an_ended_shipper_is_taken_up_where_it_stopped(
    bus: Bus, s3: S3Server, shipper_process: Start, end: int
) -> None:
    bucket = s3.make_bucket()
    url = f"s3://{bucket}"
    sent = await send(bus, {"core_1": os.urandom(PARTS * PART)}, encoding="identity")
    key = f"{sent.folder}/core_1"
    async with slow_way(s3.port, rate=10 * MIB) as way:
        first = await shipper_process([url], **settings_for(s3, way))
        await bus.publish(sent.item(url))
        await until(lambda: way.up > 3 * PART)
        way.rate = 64 * 1024  # else it would finish on SIGTERM
        first.kill(end)
        await first.wait(60)
    parts = await asyncio.to_thread(stored_parts, s3, bucket, key)
    assert 1 <= len(parts) < PARTS

    async with slow_way(s3.port, rate=0) as way:
        second = await shipper_process([url], **settings_for(s3, way))
        (receipt,) = await receipts_of(bus, sent, 1, within=90)
        await nothing_left(bus)

    left = sent.files[0].stored_size - sum(part.size or 0 for part in parts)
    assert 0 < way.up < left + MIB, "only what was not there, and some headers"
    assert receipt.shipper == f"shipper-host/{second.pid}"
    assert s3.read(bucket, key) == sent.contents["core_1"]
    assert s3.unfinished_uploads(bucket) == []


async def test_stopped_shipper_and_its_successor_complete_one_object(
    bus: Bus, s3: S3Server, shipper_process: Start
) -> None:
    """A shipper that was only stopped finds, when it goes on, that another was faster."""
    bucket = s3.make_bucket()
    url = f"s3://{bucket}"
    sent = await send(bus, {"core_1": os.urandom(PARTS * PART)}, encoding="identity")
    async with slow_way(s3.port, rate=10 * MIB) as way:
        first = await shipper_process([url], **settings_for(s3, way))
        await bus.publish(sent.item(url))
        await until(lambda: way.up > 2 * PART)
        first.kill(signal.SIGSTOP)
        way.rate = 0
        second = await shipper_process([url], **settings_for(s3, way))
        (receipt,) = await receipts_of(bus, sent, 1, within=90)
        first.kill(signal.SIGCONT)
        await until(lambda: asyncio.to_thread(is_idle, first), within=60)
        await nothing_left(bus)

    assert receipt.shipper == f"shipper-host/{second.pid}"
    assert s3.read(bucket, f"{sent.folder}/core_1") == sent.contents["core_1"]
    assert s3.unfinished_uploads(bucket) == []
    assert len(await receipts_of(bus, sent, 1)) == 1, "it saw that another had delivered"


def is_idle(shipper: ServiceProcess) -> bool:
    return shipper.metric("crashbus_shipper_items_in_hand") == 0


async def test_upload_that_nobody_goes_on_with_is_removed(
    bus: Bus, s3: S3Server, shipper_process: Start
) -> None:
    bucket = s3.make_bucket()
    sent = await send(bus, {"core_1": b"x"})
    client = s3.client()
    ours = f"pre/{sent.folder}/core_1.zst"
    of_others = ["pre/backup.tar", f"{sent.folder}/core_1.zst", "pre/a/2026-11-29/b/c"]
    for key in (ours, *of_others):
        upload = client._create_multipart_upload(bucket, key, {})
        client._upload_part(bucket, key, b"x", {}, upload, 1)
    old = {"CRASHBUS_SHIPPER_S3_ABANDONED_AFTER": "0.001"}

    await shipper_process([f"s3://{bucket}/pre"], **s3.settings())
    young = await shipper_process([f"s3://{bucket}/pre"], **s3.settings(), **old)
    await until(lambda: "removed an abandoned upload" in young.log)

    left = await until(lambda: asyncio.to_thread(s3.unfinished_uploads, bucket))
    assert sorted(left) == sorted(of_others)


async def test_item_that_is_given_up_leaves_no_upload(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    bucket = s3.make_bucket()
    url = f"s3://{bucket}"
    sent = await send(bus, {"core_1": os.urandom(4 * PART)}, encoding="identity")
    async with slow_way(s3.port, rate=10 * MIB) as way:
        settings = s3_settings(s3, s3_endpoint=way.endpoint, give_up=1, stall=1)
        await bus.publish(sent.item(url))
        async with shipping([url], settings):
            await until(lambda: way.up > 2 * PART)
            way.rate = 256 * 1024  # a part takes 20 s, but the server can be spoken to
            (letter,) = await dead_letters(bus, within=60)
            await nothing_left(bus)

    assert letter.reason == "stalled"
    assert s3.unfinished_uploads(bucket) == []


def s3_settings(s3: S3Server, **changes: object) -> ShipperSettings:
    return quick(
        **{
            "s3_endpoint": s3.endpoint,
            "s3_access_key": s3.access_key,
            "s3_secret_key": s3.secret_key,
            "s3_part_size": PART,
            **changes,
        }
    )


async def test_what_was_left_of_a_delivered_file_goes_though_the_way_is_cut(s3: S3Server) -> None:
    bucket, way = s3.make_bucket(), Proxy(s3.port)
    settings = {**s3.settings(), "CRASHBUS_SHIPPER_S3_ENDPOINT": f"http://127.0.0.1:{way.port}"}
    names = {name.removeprefix("CRASHBUS_SHIPPER_").lower(): settings[name] for name in settings}
    api = S3Api(ShipperSettings(**names))  # type: ignore[arg-type]
    try:
        api.begin(bucket, "core_1", {})
        way.refuses = True
        way.cut()
        removing = asyncio.create_task(asyncio.to_thread(remove_unfinished, api, bucket, "core_1"))
        await until(lambda: way.done["connections refused"])
        way.restore()
        await removing
    finally:
        way.close()

    assert s3.unfinished_uploads(bucket) == []
