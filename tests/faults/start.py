"""Starting the pipeline that faults are done to."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from crashbus import Bus, connect
from tests.faults.bucket import PREFIX, Bucket
from tests.faults.rig import HOST, Rig
from tests.support.core_pattern import core_pattern_kept
from tests.support.disk import small_disk
from tests.support.nats import NatsServer
from tests.support.proxy import Proxy
from tests.support.s3 import S3Server
from tests.support.service import ServiceProcess

CHUNK_STORE = 1024**3  # bytes
SHIPPERS = 2

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
        rig = await _made(stack, scratch, s3, largest, real)
        stack.push_async_callback(_end, rig)
        for service in rig.services:
            await service.start()
        await rig.healthy()
        yield rig


async def _end(rig: Rig) -> None:
    for way in (rig.collector_way, rig.shipper_way, rig.s3_way):
        way.restore()
    await asyncio.gather(*(service.stop() for service in rig.services))


async def _made(
    stack: AsyncExitStack, scratch: Path, s3: S3Server, largest: int, real: bool
) -> Rig:
    scratch.chmod(0o755)
    spool_disk = stack.enter_context(small_disk(scratch / "spool", 64 * largest if real else 16384))
    state_disk = stack.enter_context(small_disk(scratch / "state", 48))
    nats_disk = stack.enter_context(small_disk(scratch / "bus", 4096))
    spool = spool_disk.place / "appscope"
    spool.mkdir()
    spool.chmod(0o1777)
    server = NatsServer(nats_disk.place)
    server.start()
    stack.callback(server.stop)
    collector_way, shipper_way, s3_way = (
        _way(stack, port) for port in (server.port, server.port, s3.port)
    )
    user = f"faults-{uuid.uuid4().hex[:8]}"
    keys = await asyncio.to_thread(s3.add_user, user)
    bucket = Bucket(s3, keys, user)
    await asyncio.to_thread(bucket.make)
    environment = {
        **_QUICK,
        "CRASHBUS_HOST": HOST,
        "CRASHBUS_CHUNK_STORE_BYTES": str(CHUNK_STORE),
        "CRASHBUS_SPOOL": str(spool),
        "CRASHBUS_STATE": str(state_disk.place),
        "CRASHBUS_DESTINATIONS": f"s3://{bucket.name}/{PREFIX}",
        "CRASHBUS_SHIPPER_S3_ENDPOINT": f"http://127.0.0.1:{s3_way.port}",
        "CRASHBUS_SHIPPER_S3_ACCESS_KEY": keys[0],
        "CRASHBUS_SHIPPER_S3_SECRET_KEY": keys[1],
        **(_of_capture(scratch) if real else {}),
    }
    captures = ("recorder", "detector") if real else ()
    rig = Rig(
        s3=s3,
        nats=server,
        bus=await _connected(stack, server),
        bucket=bucket,
        spool=spool,
        spool_disk=spool_disk,
        state_disk=state_disk,
        nats_disk=nats_disk,
        collector_way=collector_way,
        shipper_way=shipper_way,
        s3_way=s3_way,
        user=user,
        largest=largest,
        collector=_service("collector", scratch / "c", environment, collector_way),
        shippers=[
            _service("shipper", scratch / f"s{number}", environment, shipper_way)
            for number in range(SHIPPERS)
        ],
        capture={
            name: _service(name, scratch / name, environment, collector_way) for name in captures
        },
    )
    await rig.watch_acks()
    return rig


def _way(stack: AsyncExitStack, port: int) -> Proxy:
    way = Proxy(port)
    stack.callback(way.close)
    return way


async def _connected(stack: AsyncExitStack, server: NatsServer) -> Bus:
    bus = await stack.enter_async_context(connect(server.url))
    await bus.ensure_streams(CHUNK_STORE)
    return bus


def _of_capture(scratch: Path) -> dict[str, str]:
    return {
        "CRASHBUS_COLLECTOR_KEEP_DELIVERED": "86400",
        "CRASHBUS_RECORDER_SOCKET": str(scratch / "run" / "s"),
        "CRASHBUS_RECORDER_WATCHDOG_DEADLINE": "3",
    }


def _service(name: str, place: Path, environment: dict[str, str], way: Proxy) -> ServiceProcess:
    place.mkdir()
    url = {"CRASHBUS_NATS_URL": f"nats://127.0.0.1:{way.port}"}
    return ServiceProcess(name, place, {**environment, **url})
