"""The pipeline that faults are done to, with a way of its own to each server."""

import asyncio
import hashlib
import json
import os
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import nats.errors
import zstandard
from minio import Minio
from minio.deleteobjects import DeleteObject
from nats.js.api import StreamInfo
from urllib3 import PoolManager, Retry, Timeout

from crashbus import Bus, DeadLetter, Manifest, connect, layout, streams
from crashbus.errors import BusUnreachable
from tests.faults.crashes import CrashSet, RealCrash
from tests.support.core_pattern import core_pattern_kept
from tests.support.disk import SmallDisk, small_disk
from tests.support.nats import NatsServer
from tests.support.proxy import Proxy
from tests.support.s3 import S3Server
from tests.support.service import ServiceProcess
from tests.support.wait import until

HOST = "test-host"
PREFIX = "crashes"
# Seconds; the machine may be busy, and only a fault of ours takes so long.
PATIENCE = float(os.environ.get("FAULT_PATIENCE", "110"))

# So that what waits does not make a test wait; the order of these is as by default.
_QUICK = {
    "CRASHBUS_COLLECTOR_RECHECK": "1",
    "CRASHBUS_COLLECTOR_KEEP_DELIVERED": "0",
    "CRASHBUS_SHIPPER_ACK_WAIT": "4",
    "CRASHBUS_SHIPPER_RETRY_FIRST": "0.1",
    "CRASHBUS_SHIPPER_RETRY_CAP": "1",
    "CRASHBUS_SHIPPER_RETRY_IN_HAND": "2",
    "CRASHBUS_SHIPPER_SOURCE_PATIENCE": "5",
    "CRASHBUS_SHIPPER_S3_PART_SIZE": str(5 * 1024 * 1024),
    "CRASHBUS_SHIPPER_S3_CONNECT_TIMEOUT": "3",
    "CRASHBUS_SHIPPER_S3_READ_TIMEOUT": "3",
}


@dataclass
class Rig:
    """Everything that runs.

    Attributes:
        bus: the test's own connection, past the ways.
        collector_way: the collector's way to the bus.
        shipper_way: the shippers' way to the bus.
        s3_way: the shippers' way to the S3 server.
        user: the S3 user that is its own.
        largest: MiB of a core at most.
        capture: recorder and detector, where crashes are real.
    """

    s3: S3Server
    nats: NatsServer
    bus: Bus
    spool: Path
    spool_disk: SmallDisk
    state_disk: SmallDisk
    nats_disk: SmallDisk
    collector_way: Proxy
    shipper_way: Proxy
    s3_way: Proxy
    user: str
    keys: tuple[str, str]
    bucket: str
    environment: dict[str, str]
    largest: int
    collector: ServiceProcess
    shippers: list[ServiceProcess]
    capture: dict[str, ServiceProcess]

    @property
    def services(self) -> list[ServiceProcess]:
        return [self.collector, *self.shippers, *self.capture.values()]

    @property
    def destination(self) -> str:
        return f"s3://{self.bucket}/{PREFIX}"

    def logs(self) -> str:
        return "\n".join(f"--- {one.name} {one.http}\n{one.log[-4000:]}" for one in self.services)

    # What is at the destination

    def _client(self) -> Minio:
        """Return a client that does not wait long and does not try again: we do that."""
        address = self.s3.endpoint.removeprefix("http://")
        pool = PoolManager(timeout=Timeout(3, 30), retries=Retry(0))
        return Minio(address, *self.keys, secure=False, region="us-east-1", http_client=pool)

    def _list(self) -> dict[str, list[str]]:
        """Return the objects of each crash, by its ID; every folder ends with one."""
        found: dict[str, list[str]] = {}
        for one in self._client().list_objects(self.bucket, f"{PREFIX}/", recursive=True):
            key = str(one.object_name)
            if f"/{layout.BINARIES}/" not in key:
                found.setdefault(key.split("/")[-2].rpartition("-")[2], []).append(key)
        return found

    async def _objects(self) -> dict[str, list[str]]:
        try:
            return await asyncio.to_thread(self._list)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is asked again
            print(f"the S3 server does not list: {error}")
            return {}

    async def delivered(self, crashes: Iterable[CrashSet], within: float = PATIENCE) -> None:
        """Return once every crash is delivered, bit for bit and once, and nothing is left."""
        wanted = list(crashes)
        await self._until(lambda: self._have_manifests(wanted), "all manifests", within)
        await self._until(self._nothing_left, "nothing left on the way", within)
        objects = await asyncio.to_thread(self._list)
        for crash in wanted:
            await asyncio.to_thread(self._check, crash, objects[crash.crash_id])
        await asyncio.to_thread(self._remove, [objects[crash.crash_id] for crash in wanted])

    async def _until(
        self, condition: Callable[[], bool | Awaitable[bool]], what: str, within: float
    ) -> None:
        try:
            await until(condition, within, every=0.2)
        except TimeoutError as error:
            letters = [
                (letter.crash_id, letter.reason, letter.error)
                for letter in await self.bus.stored(DeadLetter)
            ]
            consumers = await self.bus._js.consumers_info(streams.FILES)
            print(await self._left(), consumers, letters, self.logs(), sep="\n")
            raise AssertionError(f"{what}: {error}") from None

    async def _have_manifests(self, crashes: list[CrashSet]) -> bool:
        objects = await self._objects()
        return all(
            any(key.endswith("/manifest.json") for key in objects.get(crash.crash_id, []))
            for crash in crashes
        )

    def _check(self, crash: CrashSet, keys: list[str]) -> None:
        found = {}
        for key in keys:
            name = key.rpartition("/")[2]
            content = self._read(key)
            if name == "manifest.json":
                listed = {file["name"]: file["sha256"] for file in json.loads(content)["files"]}
                assert listed == crash.sha256, f"{key} names other files"
            else:
                found[name.removesuffix(".zst")] = hashlib.sha256(content).hexdigest()
        assert found == crash.sha256, f"crash {crash.crash_id} is not what it was"
        assert len(keys) == len(crash.sha256) + 1, f"more than one delivery of it: {keys}"

    def _read(self, key: str) -> bytes:
        answer = self._client().get_object(self.bucket, key)
        stored = bytes(answer.read())
        answer.release_conn()
        if not key.endswith(".zst"):
            return stored
        with zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True) as reader:
            return bytes(reader.read())

    def _remove(self, folders: list[list[str]]) -> None:
        """Make room for the next crashes."""
        keys = [DeleteObject(key) for folder in folders for key in folder]
        assert not list(self._client().remove_objects(self.bucket, keys))

    # What is on the way

    async def _nothing_left(self) -> bool:
        try:
            return not any(await self._left())
        except nats.errors.Error as error:  # killed just before, or its streams are made anew
            print(f"the bus does not tell: {error}")
            return False

    async def _left(self) -> tuple[int, int, list[str]]:
        """Return how many work items and chunks wait, and the uploads that are not complete."""
        items = await self.stream(streams.FILES)
        chunks = [await self.stream(name) for name in (streams.CHUNKS, streams.SMALL_CHUNKS)]
        uploads = await asyncio.to_thread(self._uploads)
        count = sum(one.state.messages for one in chunks)
        return items.state.messages, count, uploads

    def _uploads(self) -> list[str]:
        found = self._client()._list_multipart_uploads(self.bucket)
        return [str(one.object_name) for one in found.uploads]

    async def stream(self, name: str) -> StreamInfo:
        return await self.bus._js.stream_info(name)

    async def spool_is_empty(self) -> None:
        """Return once nothing of any crash is left in the spool and in the ledger."""

        def look() -> bool:
            ledger = self.state_disk.place / "collector"
            return not any(self.spool.glob("[0-9]*")) and not any(ledger.glob("*.json"))

        await self._until(look, "an empty spool", PATIENCE)

    async def told(self, crashes: Iterable[RealCrash]) -> list[str]:
        """Return what became of each crash, once it can be seen: delivered, cut short or failed."""
        wanted, ends = list(crashes), dict[str, str]()

        async def look() -> bool:
            objects = await self._objects()
            try:
                letters = await self.bus.stored(DeadLetter)
            except BusUnreachable:  # or its streams are made anew
                return False
            for crash in wanted:
                keys = objects.get(crash.crash_id, [])
                if any(key.endswith("/manifest.json") for key in keys):
                    ends[crash.crash_id] = "delivered"
                elif found := [one for one in letters if one.crash_id == crash.crash_id]:
                    print([(one.reason, one.error) for one in found])
                    ends[crash.crash_id] = "failed"
            return len(ends) == len(wanted)

        await self._until(look, "an end that can be seen", PATIENCE)
        await self._until(self._nothing_left, "nothing left on the way", PATIENCE)
        objects = await asyncio.to_thread(self._list)
        for crash in wanted:
            if ends[crash.crash_id] == "delivered":
                keys = objects[crash.crash_id]
                if not await asyncio.to_thread(self._check_real, crash, keys):
                    ends[crash.crash_id] = "cut short"
        return [ends[crash.crash_id] for crash in wanted]

    def _check_real(self, crash: RealCrash, keys: list[str]) -> bool:
        """Check a delivered crash against the spool; return whether it is whole."""
        (key,) = (key for key in keys if key.endswith("/manifest.json"))
        manifest = Manifest.model_validate_json(self._read(key))
        assert manifest.process.pid == crash.pid
        own = [file for file in manifest.files if file.kind not in layout.SHARED]
        for file in own:
            content = self._read(f"{PREFIX}/{manifest.folder}/{file.stored_name}")
            assert hashlib.sha256(content).hexdigest() == file.sha256, file.name
            source = self.spool / str(crash.pid) / file.name
            # What was delivered goes first where the disk is full.
            assert not source.exists() or source.read_bytes() == content, file.name
        assert len(keys) == len(own) + 1, f"more than one delivery of it: {keys}"
        return len(own) == 6 and not any(file.truncated for file in own)

    async def failed(self, crashes: Iterable[CrashSet]) -> None:
        """Return once every file of these crashes is told to have failed."""
        wanted = {(crash.crash_id, name) for crash in crashes for name in crash.sha256}

        async def look() -> bool:
            letters = await self.bus.stored(DeadLetter)
            told = {
                (one.crash_id, file.name) for one in letters if one.work for file in one.work.files
            }
            return wanted <= told

        await self._until(look, "dead letters", PATIENCE)

    async def replayed(self, crashes: Iterable[CrashSet]) -> None:
        """Ask for what failed until it is delivered; the server may need a while to know better."""
        wanted = list(crashes)

        async def ask() -> bool:
            if await self._have_manifests(wanted):
                return True
            asking = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "crashbus", "retry", "--all"),
                env={**os.environ, "CRASHBUS_NATS_URL": self.nats.url},
            )
            await asking.wait()
            await asyncio.sleep(1)
            return False

        await self._until(ask, "a delivery of what failed", PATIENCE)

    # What can be done to it

    def service(self, name: str) -> ServiceProcess:
        return next(one for one in self.services if one.name == name)

    async def restart(self, service: ServiceProcess) -> None:
        """Start a service that was killed."""
        await service.wait(30)
        await service.start()

    async def restart_nats(self, *, lose_store: bool = False) -> None:
        """Start the killed server again, at the same address."""
        if lose_store:
            await asyncio.to_thread(self.nats.lose_store)
        await asyncio.to_thread(self.nats.start)

    async def healthy(self) -> None:
        """Return once everybody works, so that one fault at a time is tried.

        A shipper whose last delivery failed says so until its next one.
        """
        await asyncio.gather(
            *(self._until(self._works(one), "health", 60) for one in self.services)
        )

    def _works(self, service: ServiceProcess) -> Callable[[], Awaitable[bool]]:
        def look() -> bool:
            try:
                with urllib.request.urlopen(f"http://{service.http}/healthz", timeout=5) as answer:
                    return bool(answer.status == 200)
            except urllib.error.HTTPError as error:
                return all(fault.startswith("destination ") for fault in json.load(error)["faults"])
            except OSError:
                return False

        return lambda: asyncio.to_thread(look)


@asynccontextmanager
async def running(
    scratch: Path, s3: S3Server, largest: int, *, real: bool = False
) -> AsyncIterator[Rig]:
    """Start a pipeline, and end it.

    Args:
        real: with recorder and detector; core_pattern is theirs, and files stay in the spool.
    """
    async with AsyncExitStack() as stack:
        if real:
            stack.enter_context(core_pattern_kept())
        scratch.chmod(0o755)
        spool_disk = stack.enter_context(
            small_disk(scratch / "spool", 64 * largest if real else 16384)
        )
        state = stack.enter_context(small_disk(scratch / "state", 48))
        nats_disk = stack.enter_context(small_disk(scratch / "bus", 4096))
        server = NatsServer(nats_disk.place)
        server.start()
        stack.callback(server.stop)
        ways = [Proxy(port) for port in (server.port, server.port, s3.port)]
        for way in ways:
            stack.callback(way.close)
        user = f"faults-{uuid.uuid4().hex[:8]}"
        keys = await asyncio.to_thread(s3.add_user, user)
        bucket = user
        address = s3.endpoint.removeprefix("http://")
        owner = Minio(address, *keys, secure=False, region="us-east-1")
        await asyncio.to_thread(owner.make_bucket, bucket)
        spool = spool_disk.place / "appscope"
        spool.mkdir()
        spool.chmod(0o1777)
        environment = {
            **_QUICK,
            "CRASHBUS_HOST": HOST,
            "CRASHBUS_CHUNK_STORE_BYTES": str(1024**3),
            "CRASHBUS_SPOOL": str(spool),
            "CRASHBUS_STATE": str(state.place),
            "CRASHBUS_DESTINATIONS": f"s3://{bucket}/{PREFIX}",
            "CRASHBUS_SHIPPER_S3_ENDPOINT": f"http://127.0.0.1:{ways[2].port}",
            "CRASHBUS_SHIPPER_S3_ACCESS_KEY": keys[0],
            "CRASHBUS_SHIPPER_S3_SECRET_KEY": keys[1],
        }
        if real:
            environment |= {
                "CRASHBUS_COLLECTOR_KEEP_DELIVERED": "86400",
                "CRASHBUS_RECORDER_SOCKET": str(scratch / "run" / "s"),
                "CRASHBUS_RECORDER_WATCHDOG_DEADLINE": "3",
            }
        bus = await stack.enter_async_context(connect(server.url))
        await bus.ensure_streams(1024**3)
        made = Rig(
            s3=s3,
            nats=server,
            bus=bus,
            spool=spool,
            spool_disk=spool_disk,
            state_disk=state,
            nats_disk=nats_disk,
            collector_way=ways[0],
            shipper_way=ways[1],
            s3_way=ways[2],
            user=user,
            keys=keys,
            bucket=bucket,
            environment=environment,
            largest=largest,
            collector=_service("collector", scratch / "c", environment, ways[0]),
            shippers=[
                _service("shipper", scratch / f"s{number}", environment, ways[1])
                for number in range(2)
            ],
            capture={
                name: _service(name, scratch / name, environment, ways[0])
                for name in ("recorder", "detector")
                if real
            },
        )
        try:
            for service in made.services:
                await service.start()
            await made.healthy()
            yield made
        finally:
            for way in ways:
                way.restore()
            await asyncio.gather(*(service.stop() for service in made.services))


def _service(name: str, place: Path, environment: dict[str, str], way: Proxy) -> ServiceProcess:
    place.mkdir()
    url = {"CRASHBUS_NATS_URL": f"nats://127.0.0.1:{way.port}"}
    return ServiceProcess(name, place, {**environment, **url})
