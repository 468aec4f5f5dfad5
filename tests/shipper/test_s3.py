"""Delivery to a real S3 server."""

import asyncio
import hashlib
import io
import os

import pytest
import zstandard

from crashbus import Bus
from crashbus.layout import Kind, binary_name
from services.shipper.destinations.s3 import S3Deliverer
from services.shipper.settings import ShipperSettings
from tests.shipper.conftest import (
    MIB,
    Running,
    Sent,
    dead_letters,
    nothing_left,
    quick,
    receipts_of,
    send,
)
from tests.support.s3 import S3Server
from tests.support.wait import until

SMALL = {"info_1": b"Process name: x", "backtrace_1": b"#0 0x1 main\n" * 50, "cfg_1": b"{}"}


def s3_settings(s3: S3Server, **changes: object) -> ShipperSettings:
    return quick(
        **{
            "s3_endpoint": s3.endpoint,
            "s3_access_key": s3.access_key,
            "s3_secret_key": s3.secret_key,
            "s3_part_size": 5 * MIB,
            **changes,
        }
    )


async def deliver(bus: Bus, sent: Sent, url: str) -> None:
    await sent.offer(bus, url)


def original(s3: S3Server, bucket: str, key: str) -> bytes:
    stored = s3.read(bucket, key)
    if not key.endswith(".zst"):
        return stored
    with zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True) as reader:
        return reader.read()


def key_of(sent: Sent, name: str, prefix: str = "") -> str:
    file = next(one for one in sent.files if one.name == name)
    return f"{prefix}{sent.folder}/{file.stored_name}"


async def test_binary_is_uploaded_once_and_never_replaced_by_another(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    bucket = s3.make_bucket()
    url = f"s3://{bucket}/prefix"
    contents = [b"the first", b"of the same build, stripped", b"the first"]
    keys = []
    async with shipping([url], s3_settings(s3)):
        for content in contents:
            name = binary_name(Kind.EXECUTABLE, "ab" * 20, hashlib.sha256(content).hexdigest())
            sent = await send(bus, {name: content}, encoding="identity")
            await bus.publish(sent.item(url))
            (receipt,) = await receipts_of(bus, sent, 1)
            keys.append(receipt.url.removeprefix(f"s3://{bucket}/"))
        await nothing_left(bus)

    folder = f"prefix/build-id/ab/{'ab' * 19}"
    other = f"executable-{hashlib.sha256(contents[1]).hexdigest()[:16]}"
    assert keys == [f"{folder}/executable", f"{folder}/{other}", f"{folder}/executable"]
    assert [s3.read(bucket, key) for key in keys] == contents


@pytest.mark.parametrize("size", [1000, 6 * MIB], ids=["whole", "in parts"])
async def test_binary_that_comes_while_another_is_delivered_is_not_replaced(
    bus: Bus, s3: S3Server, shipping: Running, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    bucket, key = s3.make_bucket(), f"build-id/ab/{'ab' * 19}/executable"
    looked, other = S3Deliverer.sha256_of, b"of another shipper"

    async def looked_too_early(self: S3Deliverer, folder: str, name: str) -> str | None:
        found = await looked(self, folder, name)
        if found is None and f"{folder}/{name}" == key:
            s3.client().put_object(bucket, key, io.BytesIO(other), len(other))
        return found

    monkeypatch.setattr(S3Deliverer, "sha256_of", looked_too_early)
    content = os.urandom(size)
    name = binary_name(Kind.EXECUTABLE, "ab" * 20, hashlib.sha256(content).hexdigest())
    sent = await send(bus, {name: content}, encoding="identity")
    await bus.publish(sent.item(f"s3://{bucket}"))

    async with shipping([f"s3://{bucket}"], s3_settings(s3)):
        (receipt,) = await receipts_of(bus, sent, 1)

    assert s3.read(bucket, key) == other
    assert s3.read(bucket, receipt.url.removeprefix(f"s3://{bucket}/")) == content


async def test_small_and_large_files_arrive_bit_for_bit(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    bucket = s3.make_bucket()
    url = f"s3://{bucket}/some/prefix"
    contents = SMALL | {"core_1": os.urandom(40 * MIB), "snapshot_1": b""}
    sent = await send(bus, contents)
    await deliver(bus, sent, url)

    async with shipping([url], s3_settings(s3)):
        receipts = await receipts_of(bus, sent, 5)
        await nothing_left(bus)

    for receipt in receipts:
        key = receipt.url.removeprefix(f"s3://{bucket}/")
        assert key == key_of(sent, receipt.file.name, "some/prefix/")
        content = original(s3, bucket, key)
        assert hashlib.sha256(content).hexdigest() == receipt.file.sha256
        assert content == contents[receipt.file.name]
        assert (receipt.attempts, receipt.shipper) == (1, "test-shipper")
        stat = s3.client().stat_object(bucket, key)
        assert stat.metadata is not None
        assert stat.metadata["x-amz-meta-crashbus-sha256"] == receipt.file.sha256
        assert stat.metadata["x-amz-meta-crashbus-size"] == str(receipt.file.size)
    assert s3.unfinished_uploads(bucket) == []
    core = s3.client().stat_object(bucket, key_of(sent, "core_1", "some/prefix/"))
    assert str(core.etag).endswith("-8"), "40 MiB should go in parts"


async def test_files_as_they_are_arrive_under_their_own_names(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    bucket = s3.make_bucket()
    sent = await send(bus, {"core_1": os.urandom(6 * MIB)}, encoding="identity")
    await deliver(bus, sent, f"s3://{bucket}")

    async with shipping([f"s3://{bucket}"], s3_settings(s3)):
        await receipts_of(bus, sent, 1)

    assert s3.keys(bucket) == [f"{sent.folder}/core_1"]
    assert s3.read(bucket, f"{sent.folder}/core_1") == sent.contents["core_1"]


@pytest.mark.parametrize("size", [100, 7 * MIB])
@pytest.mark.parametrize(
    ("wrong", "reason", "mend"),
    [
        ({"s3_secret_key": "no"}, "wrong_secret_key", "CRASHBUS_SHIPPER_S3_SECRET_KEY"),
        ({"s3_access_key": "no"}, "unknown_access_key", "CRASHBUS_SHIPPER_S3_ACCESS_KEY"),
    ],
)
async def test_wrong_keys_are_a_dead_letter_at_once(
    bus: Bus,
    s3: S3Server,
    shipping: Running,
    wrong: dict[str, str],
    reason: str,
    mend: str,
    size: int,
) -> None:
    bucket = s3.make_bucket()
    # Parts larger than the file: one request with a body that the server does not want to read.
    settings = s3_settings(s3, **wrong, s3_part_size=8 * MIB)
    sent = await send(bus, {"core_1": os.urandom(size)}, encoding="identity")
    item = sent.item(f"s3://{bucket}")
    await bus.publish(item)

    async with shipping([f"s3://{bucket}"], settings):
        (letter,) = await dead_letters(bus)
        await nothing_left(bus)

    assert (letter.reason, letter.attempts, letter.work) == (reason, 1, item)
    assert mend in letter.mend
    assert len(letter.history) == 1
    assert s3.keys(bucket) == []


async def test_key_without_the_right_to_write_is_a_dead_letter(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    access, secret = await asyncio.to_thread(s3.add_user, "stranger")
    bucket = s3.make_bucket()
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(f"s3://{bucket}"))

    async with shipping(
        [f"s3://{bucket}"], s3_settings(s3, s3_access_key=access, s3_secret_key=secret)
    ):
        (letter,) = await dead_letters(bus)

    assert letter.reason == "access_denied"
    assert "s3:PutObject" in letter.mend


async def test_suspended_user_is_a_dead_letter(bus: Bus, s3: S3Server, shipping: Running) -> None:
    access, secret = await asyncio.to_thread(s3.add_user, "suspended")
    await asyncio.to_thread(s3.suspend, "suspended")
    bucket = s3.make_bucket()
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(f"s3://{bucket}"))

    async with shipping(
        [f"s3://{bucket}"], s3_settings(s3, s3_access_key=access, s3_secret_key=secret)
    ):
        (letter,) = await dead_letters(bus)

    assert letter.reason == "user_suspended"


async def test_missing_bucket_is_a_dead_letter(bus: Bus, s3: S3Server, shipping: Running) -> None:
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item("s3://not-there"))

    async with shipping(["s3://not-there"], s3_settings(s3)):
        (letter,) = await dead_letters(bus)

    assert letter.reason == "no_such_bucket"
    assert "CRASHBUS_SHIPPER_S3_CREATE_BUCKET" in letter.mend


async def test_missing_bucket_is_made_where_that_is_allowed(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    bucket = f"made-{os.urandom(6).hex()}"
    sent = await send(bus, SMALL)
    await deliver(bus, sent, f"s3://{bucket}")

    async with shipping([f"s3://{bucket}"], s3_settings(s3, s3_create_bucket=True)):
        await receipts_of(bus, sent, len(SMALL))

    assert len(s3.keys(bucket)) == len(SMALL)


async def test_gateway_that_is_down_gets_the_files_when_it_is_back(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    bucket = s3.make_bucket()
    url = f"s3://{bucket}"
    s3.kill_gateway()
    sent = await send(bus, SMALL)
    await deliver(bus, sent, url)

    async with shipping([url], s3_settings(s3, retry_in_hand=0.3)) as health:
        # It has given up to hold the items in hand, and says what is wrong.
        await until(lambda: f"destination {url}" in health.faults())
        await asyncio.to_thread(s3.start_gateway)
        receipts = await receipts_of(bus, sent, len(SMALL))
        assert health.faults() == {}

    assert all(receipt.attempts > 1 for receipt in receipts)


async def test_gateway_killed_during_an_upload_leaves_no_half_of_it(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    bucket = s3.make_bucket()
    sent = await send(bus, {"core_1": os.urandom(60 * MIB)}, encoding="identity")
    await bus.publish(sent.item(f"s3://{bucket}"))

    async with shipping([f"s3://{bucket}"], s3_settings(s3)):
        await until(lambda: asyncio.to_thread(s3.unfinished_uploads, bucket), every=0.001)
        s3.kill_gateway()
        await asyncio.to_thread(s3.start_gateway)
        (receipt,) = await receipts_of(bus, sent, 1, within=60)

    assert receipt.attempts > 1
    assert original(s3, bucket, f"{sent.folder}/core_1") == sent.contents["core_1"]
    assert s3.unfinished_uploads(bucket) == []


async def test_hanging_gateway_is_a_timeout_that_passes(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    bucket = s3.make_bucket()
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(f"s3://{bucket}"))
    s3.pause_gateway()

    async with shipping([f"s3://{bucket}"], s3_settings(s3, s3_read_timeout=0.5)) as health:
        faults = await until(health.faults)
        assert "the S3 server does not answer" in str(faults)
        s3.resume_gateway()
        (receipt,) = await receipts_of(bus, sent, 1)

    assert receipt.attempts > 1


async def test_damaged_file_is_not_delivered_and_nothing_of_it_stays(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    bucket = s3.make_bucket()
    sent = await send(bus, {"core_1": os.urandom(12 * MIB)}, encoding="identity")
    other = sent.files[0].model_copy(update={"sha256": "0" * 64})
    await bus.publish(sent.item(f"s3://{bucket}", files=(other,)))

    async with shipping([f"s3://{bucket}"], s3_settings(s3)):
        (letter,) = await dead_letters(bus)
        await nothing_left(bus)

    assert letter.reason == "damaged_file"
    assert "SHA-256" in letter.error
    assert s3.keys(bucket) == []
    assert s3.unfinished_uploads(bucket) == []


async def test_delivering_again_writes_the_same_object(
    bus: Bus, s3: S3Server, shipping: Running
) -> None:
    bucket = s3.make_bucket()
    sent = await send(bus, SMALL)
    async with shipping([f"s3://{bucket}"], s3_settings(s3)):
        await deliver(bus, sent, f"s3://{bucket}")
        await receipts_of(bus, sent, len(SMALL))
        await deliver(bus, sent, f"s3://{bucket}")
        await receipts_of(bus, sent, 2 * len(SMALL))

    assert s3.keys(bucket) == sorted(key_of(sent, name) for name in SMALL)
