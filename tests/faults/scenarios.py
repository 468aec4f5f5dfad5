"""The faults, each a context: entered, it is there; left, it is over.

A scenario with ``first`` has its fault before the crashes come; in all others it comes at a random
moment while they are delivered.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from random import Random
from signal import SIGCONT, SIGKILL, SIGSTOP

import msgpack
from nats.aio.msg import Msg

from crashbus import streams
from tests.faults.rig import Rig
from tests.support.proxy import Proxy
from tests.support.wait import until

MIB = 1024 * 1024

Fault = Callable[[Rig, Random], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class Scenario:
    """A fault and what is expected of it.

    Attributes:
        lasts: seconds, the shortest and the longest.
        noisy: cores are large and do not compress.
        gap: a crash may be cut short or not captured, and is told to be so.
        replayed: crashes are told as failed, and delivered once they are replayed.
        in_ci: it is steady and short enough for each run.
    """

    name: str
    fault: Fault
    first: bool = False
    lasts: tuple[float, float] = (0.2, 1.5)
    replayed: bool = False
    noisy: bool = False
    gap: bool = False
    in_ci: bool = True

    def __str__(self) -> str:
        return self.name


# Processes


def killed(name: str) -> Fault:
    """Return a fault that kills a service, which is started again."""

    @asynccontextmanager
    async def fault(rig: Rig, random: Random) -> AsyncIterator[None]:
        service = rig.service(name)
        service.kill(SIGKILL)
        yield
        await rig.restart(service)

    return fault


def stopped(name: str) -> Fault:
    """Return a fault that lets a service hang, which goes on, or was killed for it."""

    @asynccontextmanager
    async def fault(rig: Rig, random: Random) -> AsyncIterator[None]:
        service = rig.service(name)
        service.kill(SIGSTOP)
        yield
        if service.has_ended:
            await rig.restart(service)
        else:
            service.kill(SIGCONT)

    return fault


@asynccontextmanager
async def all_shippers_killed(rig: Rig, random: Random) -> AsyncIterator[None]:
    for shipper in rig.shippers:
        shipper.kill(SIGKILL)
    yield
    for shipper in rig.shippers:
        await rig.restart(shipper)


@asynccontextmanager
async def all_killed(rig: Rig, random: Random) -> AsyncIterator[None]:
    """Without recorder and detector nobody would ever know of a crash: one of them stays."""
    services = [service for service in rig.services if service.name != "detector"]
    rig.nats.kill()
    for service in services:
        service.kill(SIGKILL)
    yield
    await rig.restart_nats()
    for service in services:
        await rig.restart(service)


# The bus


@asynccontextmanager
async def nats_killed(rig: Rig, random: Random) -> AsyncIterator[None]:
    rig.nats.kill()
    yield
    await rig.restart_nats()


@asynccontextmanager
async def nats_stopped(rig: Rig, random: Random) -> AsyncIterator[None]:
    rig.nats.pause()
    yield
    rig.nats.resume()


@asynccontextmanager
async def nats_store_lost(rig: Rig, random: Random) -> AsyncIterator[None]:
    rig.nats.kill()
    yield
    await rig.restart_nats(lose_store=True)


@asynccontextmanager
async def bus_store_full(rig: Rig, random: Random) -> AsyncIterator[None]:
    """No shipper takes anything away, and there is room for one core."""
    config = (await rig.stream(streams.CHUNKS)).config
    room = config.max_bytes
    rig.shipper_way.silence()
    await rig.bus._js.update_stream(config.evolve(max_bytes=rig.largest * MIB + 2 * MIB))
    yield
    await until(lambda: rig.collector.metric("crashbus_collector_bus_full_total") > 0)
    await rig.bus._js.update_stream(config.evolve(max_bytes=room))
    rig.shipper_way.restore()


@asynccontextmanager
async def bus_disk_full(rig: Rig, random: Random) -> AsyncIterator[None]:
    """A server that ran out of disk may need a restart, whoever it serves."""
    rig.nats_disk.fill()
    yield
    rig.nats.kill()
    rig.nats_disk.empty()
    await rig.restart_nats()


# The ways


def bad(way: str, **attributes: object) -> Fault:
    """Return a fault that makes a way bad as the attributes of `Proxy` say."""

    @asynccontextmanager
    async def fault(rig: Rig, random: Random) -> AsyncIterator[None]:
        proxy: Proxy = getattr(rig, way)
        for name, value in attributes.items():
            setattr(proxy, name, value)
        proxy.cut()  # connections that are open were made before it
        yield
        proxy.restore()

    return fault


def silent(way: str) -> Fault:
    @asynccontextmanager
    async def fault(rig: Rig, random: Random) -> AsyncIterator[None]:
        proxy: Proxy = getattr(rig, way)
        proxy.silence()
        yield
        proxy.restore()

    return fault


def cut_again_and_again(way: str) -> Fault:
    @asynccontextmanager
    async def fault(rig: Rig, random: Random) -> AsyncIterator[None]:
        proxy: Proxy = getattr(rig, way)
        cutting = asyncio.create_task(_cutting(proxy, random))
        yield
        cutting.cancel()
        proxy.restore()

    return fault


async def _cutting(way: Proxy, random: Random) -> None:
    while True:
        way.cut()
        await asyncio.sleep(random.uniform(0.01, 0.4))


# A file is published again five times; one that is always damaged fails, as it should.
MOST_FLIPS = 3


class Flips:
    """Changes a byte in the middle of some pieces; only a body is so long."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.count = 0

    def __call__(self, piece: bytes) -> bytes:
        if len(piece) < 48 * 1024 or self.count == MOST_FLIPS or self._random.random() > 0.1:
            return piece
        self.count += 1
        middle = len(piece) // 2
        return piece[:middle] + bytes([piece[middle] ^ 0x10]) + piece[middle + 1 :]


def flips(way: str, direction: str) -> Fault:
    """Return a fault that changes bytes; until some were changed, it goes on."""

    @asynccontextmanager
    async def fault(rig: Rig, random: Random) -> AsyncIterator[None]:
        proxy: Proxy = getattr(rig, way)
        change = Flips(random)
        setattr(proxy, f"change_{direction}", change)
        yield
        while not change.count:
            await asyncio.sleep(0.05)
        proxy.restore()

    return fault


# Messages


Meddler = Callable[[Msg], Awaitable[None]]


@asynccontextmanager
async def _listening(rig: Rig, subject: str, meddler: Meddler) -> AsyncIterator[None]:
    """Show everything that is published on a subject to a third party."""
    subscription = await rig.bus._client.subscribe(subject, cb=meddler)
    yield
    await subscription.unsubscribe()


async def _publish(rig: Rig, message: Msg, data: bytes) -> None:
    headers = {k: v for k, v in (message.headers or {}).items() if not k.startswith("Nats-")}
    await rig.bus._client.publish(message.subject, data, headers=headers or None)


def repeated(subject: str, at_once: int) -> Fault:
    """Return a fault that publishes messages once more, so many together, the last one first.

    Only work items of one crash, or chunks of one file: what waited for another's would come when
    its own is delivered and forgotten.
    """

    @asynccontextmanager
    async def fault(rig: Rig, random: Random) -> AsyncIterator[None]:
        waiting: dict[str, list[Msg]] = {}
        ours: set[tuple[str, bytes]] = set()

        async def repeat(message: Msg) -> None:
            if (message.subject, message.data) in ours:
                return
            ours.add((message.subject, message.data))
            kept = waiting.setdefault(message.subject.split(".")[3], [])
            kept.append(message)
            if len(kept) == at_once:
                for one in reversed(kept):
                    await _publish(rig, one, one.data)
                kept.clear()

        async with _listening(rig, subject, repeat):
            yield

    return fault


def damaged(subject: str, most: int, damage: Callable[[bytes], bytes]) -> Fault:
    """Return a fault that publishes damaged copies of some messages."""

    @asynccontextmanager
    async def fault(rig: Rig, random: Random) -> AsyncIterator[None]:
        count = 0

        async def meddle(message: Msg) -> None:
            nonlocal count
            if count < most:
                count += 1
                await _publish(rig, message, damage(message.data))

        async with _listening(rig, subject, meddle):
            yield

    return fault


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


def _of_another_file(data: bytes) -> bytes:
    item = msgpack.unpackb(data)
    for file in item["files"]:
        file["sha256"] = "0" * 64
    return bytes(msgpack.packb(item))


@asynccontextmanager
async def receipts_lost(rig: Rig, random: Random) -> AsyncIterator[None]:
    """The collector never hears of what was delivered while it did not listen."""
    rig.collector.kill(SIGSTOP)
    yield
    await rig.bus._js.purge_stream(streams.RECEIPTS)
    rig.collector.kill(SIGCONT)


# The S3 server


@asynccontextmanager
async def gateway_killed(rig: Rig, random: Random) -> AsyncIterator[None]:
    rig.s3.kill_gateway()
    yield
    await asyncio.to_thread(rig.s3.start_gateway)


@asynccontextmanager
async def gateway_stopped(rig: Rig, random: Random) -> AsyncIterator[None]:
    rig.s3.pause_gateway()
    yield
    rig.s3.resume_gateway()


@asynccontextmanager
async def slow_down(rig: Rig, random: Random) -> AsyncIterator[None]:
    """The gateway takes one request at a time, and answers all others SlowDown."""
    rig.s3.kill_gateway()
    await asyncio.to_thread(rig.s3.start_gateway, "--rgw-max-concurrent-requests=1")
    yield
    rig.s3.kill_gateway()
    await asyncio.to_thread(rig.s3.start_gateway)


@asynccontextmanager
async def out_of_quota(rig: Rig, random: Random) -> AsyncIterator[None]:
    scope = ("--quota-scope=user", f"--uid={rig.user}")
    await asyncio.to_thread(rig.s3.admin, "quota", "set", *scope, "--max-size=1024")
    await asyncio.to_thread(rig.s3.admin, "quota", "enable", *scope)
    yield
    await asyncio.to_thread(rig.s3.admin, "quota", "disable", *scope)


@asynccontextmanager
async def spool_disk_full(rig: Rig, random: Random) -> AsyncIterator[None]:
    rig.spool_disk.fill(leaving=random.randrange(2 * MIB))
    yield
    rig.spool_disk.empty()


@asynccontextmanager
async def user_suspended(rig: Rig, random: Random) -> AsyncIterator[None]:
    await asyncio.to_thread(rig.s3.suspend, rig.user)
    yield
    await asyncio.to_thread(rig.s3.admin, "user", "enable", f"--uid={rig.user}")


# The disk


@asynccontextmanager
async def state_disk_full(rig: Rig, random: Random) -> AsyncIterator[None]:
    rig.state_disk.fill()
    yield
    rig.state_disk.empty()


PROCESSES = (
    Scenario("collector: SIGKILL", killed("collector")),
    Scenario("collector: SIGSTOP", stopped("collector")),
    Scenario("shipper: SIGKILL", killed("shipper")),
    Scenario("shipper: SIGSTOP, longer than its items wait", stopped("shipper"), lasts=(4, 6)),
    Scenario("all shippers: SIGKILL", all_shippers_killed),
    Scenario("all services and nats-server: SIGKILL", all_killed),
    Scenario("disk of the ledger full", state_disk_full),
)
BUS = (
    Scenario("nats-server: SIGKILL", nats_killed),
    Scenario("nats-server: SIGSTOP", nats_stopped),
    Scenario("nats-server: SIGKILL, its store is lost", nats_store_lost),
    Scenario("bus has room for one core, nothing is taken", bus_store_full, first=True, noisy=True),
    Scenario("disk of nats-server full, restarted", bus_disk_full, first=True),
    Scenario("collector's way to the bus: slow", bad("collector_way", latency=0.1, rate=4 * MIB)),
    Scenario("shippers' way to the bus: slow", bad("shipper_way", latency=0.1, rate=4 * MIB)),
    Scenario("collector's way to the bus: silent", silent("collector_way")),
    Scenario("shippers' way to the bus: silent", silent("shipper_way")),
    Scenario(
        "collector's way to the bus: cut again and again", cut_again_and_again("collector_way")
    ),
    Scenario("shippers' way to the bus: cut again and again", cut_again_and_again("shipper_way")),
    Scenario("bytes flipped on the way to the bus", flips("collector_way", "up"), first=True),
    Scenario("bytes flipped on the way from the bus", flips("shipper_way", "down"), first=True),
    Scenario("work items twice, the last first", repeated("crash.file.>", 3), first=True),
    Scenario("chunks twice, the last first", repeated("crash.chunk.>", 2), first=True),
    Scenario("damaged copies of chunks", damaged("crash.chunk.>", 2, _flipped), first=True),
    Scenario("damaged copies of work items", damaged("crash.file.>", 3, _flipped), first=True),
    Scenario(
        "work items with another file's hash",
        damaged("crash.file.>", 3, _of_another_file),
        first=True,
    ),
    Scenario("receipts lost", receipts_lost),
)
S3 = (
    Scenario("S3 server: SIGKILL", gateway_killed),
    Scenario("S3 server: SIGSTOP", gateway_stopped, lasts=(1, 4)),
    Scenario("S3 server: SlowDown", slow_down, first=True),
    Scenario("S3 server: out of quota", out_of_quota, first=True),
    Scenario("S3 server: user suspended", user_suspended, first=True, replayed=True),
    Scenario("way to S3: slow", bad("s3_way", latency=0.3, rate=4 * MIB)),
    Scenario("way to S3: silent", silent("s3_way"), lasts=(1, 4)),
    Scenario("way to S3: refuses", bad("s3_way", refuses=True), first=True),
    Scenario("way to S3: reset within a part", bad("s3_way", reset_after=3 * MIB), first=True),
    Scenario("way to S3: answers are lost", bad("s3_way", loses_answers=True), first=True),
    Scenario("way to S3: cut again and again", cut_again_and_again("s3_way")),
    Scenario("bytes flipped on the way to S3", flips("s3_way", "up"), first=True),
)
# With real crashes.
CAPTURE = (
    Scenario("real crashes, detector: SIGKILL", killed("detector")),
    Scenario("real crashes, detector: SIGSTOP", stopped("detector")),
    Scenario("real crashes, recorder: SIGKILL", killed("recorder"), gap=True),
    Scenario("real crashes, recorder: SIGSTOP", stopped("recorder"), lasts=(0.2, 6), gap=True),
    Scenario("real crashes, all but the detector: SIGKILL", all_killed, gap=True),
    Scenario("real crashes, nats-server: its store is lost", nats_store_lost),
    Scenario("real crashes, disk of the spool full", spool_disk_full, first=True, gap=True),
)
ALL = PROCESSES + BUS + S3 + CAPTURE
