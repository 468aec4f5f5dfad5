"""Shippers as processes: killed, ended, started, several of them."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from crashbus import Bus, streams
from services.shipper.hands import consumer
from services.shipper.settings import ShipperSettings
from tests.shipper.conftest import (
    MIB,
    Running,
    nothing_left,
    receipts_of,
    send,
)
from tests.support.nats import NatsServer
from tests.support.proxy import Proxy
from tests.support.s3 import S3Server
from tests.support.service import ServiceProcess
from tests.support.tcp import Receiver
from tests.support.wait import until

Start = Callable[..., Awaitable[ServiceProcess]]


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
    await sent.offer(bus, url)

    receipts = await receipts_of(bus, sent, 60)
    await nothing_left(bus)

    assert sorted(receipt.file.name for receipt in receipts) == sorted(sent.contents)
    assert len({receipt.shipper for receipt in receipts}) == 2


async def test_eight_shippers_deliver_each_file_once_and_take_over_from_a_killed_one(
    bus: Bus, s3: S3Server, shipper_process: Start
) -> None:
    way, bucket = Proxy(s3.port), s3.make_bucket()
    way.silence()
    url, held = f"s3://{bucket}", 4  # as many as one has hands
    silent = {"CRASHBUS_SHIPPER_S3_ENDPOINT": f"http://127.0.0.1:{way.port}"}
    doomed = await shipper_process([url], **(s3.settings() | silent))
    await doomed.healthy()
    files = {f"info_{n}": os.urandom(1000) for n in range(60)}
    sent = await send(bus, files, encoding="identity")
    await sent.offer(bus, url)

    async def are_held() -> bool:
        info = await bus._js.consumer_info(streams.FILES, consumer(url))
        return bool(info.num_ack_pending == held)

    await until(are_held)
    others = [await shipper_process([url], **s3.settings()) for _ in range(7)]
    await receipts_of(bus, sent, len(sent.files) - held)
    doomed.kill()
    receipts = await receipts_of(bus, sent, len(sent.files))
    await nothing_left(bus)
    way.close()

    assert sorted(receipt.file.name for receipt in receipts) == sorted(sent.contents)
    assert {one.shipper for one in receipts} <= {f"shipper-host/{one.pid}" for one in others}
    for name, content in sent.contents.items():
        assert s3.read(bucket, f"{sent.folder}/{name}") == content


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
    assert "hush" not in repr(ShipperSettings(s3_secret_key="hush"))


async def test_memory_does_not_grow_with_the_file(
    bus: Bus, s3: S3Server, shipper_process: Start
) -> None:
    bucket = s3.make_bucket()
    shipper = await shipper_process([f"s3://{bucket}"], **s3.settings())
    await shipper.healthy()
    sent = await send(bus, {f"core_{n}": os.urandom(30 * MIB) for n in range(4)}, "identity")
    await sent.offer(bus, f"s3://{bucket}")

    await receipts_of(bus, sent, 4, within=60)

    status = Path(f"/proc/{shipper.pid}/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
    assert peak < 120, f"{peak} MiB"
