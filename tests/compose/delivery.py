"""What is told of services and of a container's crash, and what lies at its destinations."""

import asyncio
import hashlib
import json
import os
import re
from urllib.parse import unquote, urlsplit

import zstandard
from minio import Minio

from crashbus import Bus, Manifest, Receipt
from crashbus.layout import MANIFEST_NAME, Kind
from crashbus.messages import DeadLetter
from tests.compose.stack import Stack
from tests.support.wait import until

S3 = f"s3://crashes/{os.uname().nodename}"  # what store-keys.sh makes it
WHOLE = {Kind.INFO, Kind.BACKTRACE, Kind.BACKTRACE_JSON, Kind.SNAPSHOT, Kind.CFG, Kind.CORE}
WITHIN = 90  # seconds for a crash to be delivered on a busy machine


def stored(store: Minio, receipt: Receipt) -> bytes:
    """Return the content that a receipt of the S3 store tells of."""
    place = urlsplit(receipt.url)
    answer = store.get_object(place.netloc, unquote(place.path.lstrip("/")))
    try:
        raw = bytes(answer.read())
    finally:
        answer.close()
        answer.release_conn()
    return decompressed(raw) if receipt.file.encoding == "zstd" else raw


def decompressed(raw: bytes) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read()


async def manifest_of(bus: Bus, container: str) -> Manifest:
    """Return the manifest of the one crash of a container."""

    async def look() -> Manifest | None:
        for manifest in reversed(await bus.stored(Manifest)):
            crashed_in = manifest.process.container
            if crashed_in is not None and crashed_in.id == container:
                return manifest
        return None

    return await until(look, WITHIN, every=0.2)


async def delivered(stack: Stack, bus: Bus, container: str) -> tuple[Manifest, list[Receipt]]:
    """Return a container's crash and its receipts once its destination has all of it."""

    async def look() -> list[Receipt] | None:
        latest = await manifest_of(bus, container)
        subject = f"crash.shipped.{latest.host}.{latest.crash_id}"
        wanted = {file.name for file in latest.files} | {MANIFEST_NAME}
        receipts = await bus.stored(Receipt, subject)
        return receipts if wanted <= {one.file.name for one in receipts} else None

    try:
        receipts = await until(look, WITHIN, every=0.2)
    except TimeoutError:
        raise TimeoutError(f"{await bus.stored(DeadLetter)}\n{stack.logs()}") from None
    return await manifest_of(bus, container), receipts


async def healthy(stack: Stack, *services: str) -> None:
    """Wait until the health checks of all containers of these services go well."""
    for service in services:
        for one in stack.containers(service):
            await until(lambda c=one: not stack.fault(c), WITHIN, every=0.5)  # type: ignore[misc, arg-type]


def check_contents(stack: Stack, receipts: list[Receipt]) -> dict[str, bytes]:
    """What lies in the bucket is bit for bit what was gathered; return it by name."""
    store, found = stack.store(), {}
    latest = {one.file.name: one for one in receipts}
    # A second revision may take its place just now, when files of AppScope's join a crash.
    manifest = latest.pop(MANIFEST_NAME)
    assert json.loads(stored(store, manifest))["crash_id"] == manifest.crash_id
    for receipt in latest.values():
        content = stored(store, receipt)
        assert hashlib.sha256(content).hexdigest() == receipt.file.sha256, receipt.file.name
        assert len(content) == receipt.file.size
        found[receipt.file.name] = content
    return found


async def in_bucket(stack: Stack, crash_id: str) -> Manifest:
    """Return a crash's manifest in the bucket; the files that it names lie there, bit for bit.

    For what was delivered before the bus was killed: it may have lost the last receipts.
    """
    return await until(lambda: asyncio.to_thread(_in_bucket, stack, crash_id), WITHIN, every=0.5)


def _in_bucket(stack: Stack, crash_id: str) -> Manifest | None:
    store = stack.store()
    names = [str(one.object_name) for one in store.list_objects("crashes", recursive=True)]
    ours = [name for name in names if name.endswith(f"-{crash_id}/{MANIFEST_NAME}")]
    if not ours:
        return None
    (place,) = ours
    manifest = Manifest.model_validate_json(store.get_object("crashes", place).data)
    for file in manifest.files:
        if file.kind in WHOLE:
            stored_as = file.name + (".zst" if file.encoding == "zstd" else "")
            raw = store.get_object("crashes", place.replace(MANIFEST_NAME, stored_as)).data
            content = decompressed(raw) if file.encoding == "zstd" else raw
            assert hashlib.sha256(content).hexdigest() == file.sha256, file.name
    return manifest


def one_of(files: dict[str, bytes], pattern: str) -> bytes:
    (name,) = [name for name in files if re.fullmatch(pattern, name)]
    return files[name]
