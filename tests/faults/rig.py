"""The pipeline that faults are done to, with a way of its own to each server."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import ConsumerInfo

from crashbus import Bus, streams
from services.common.capture import is_being_written
from services.common.unrecorded import is_unrecorded
from tests.faults.bucket import Bucket
from tests.faults.crashes import RealCrash, crash, victim
from tests.faults.ends import PATIENCE, Ends, on_the_way
from tests.support.disk import SmallDisk
from tests.support.nats import NatsServer
from tests.support.proxy import Proxy
from tests.support.s3 import S3Server
from tests.support.service import ServiceProcess
from tests.support.wait import until

__all__ = ["HOST", "PATIENCE", "Rig"]

HOST = "test-host"


@dataclass
class Rig:
    """Everything that runs.

    Attributes:
        bus: the test's own connection, past the ways.
        collector_way: the way to the bus of collector, recorder and detector.
        shipper_way: the shippers' way to the bus.
        s3_way: the shippers' way to the S3 server.
        user: the S3 user that is its own.
        largest: MiB of a core at most.
        capture: recorder and detector, where crashes are real.
        begun: PIDs of all processes that were let crash, in order.
        dying: those of them that have not ended.
        taken_over: how many work items were done by who did not have them first.
    """

    s3: S3Server
    nats: NatsServer
    bus: Bus
    bucket: Bucket
    spool: Path
    spool_disk: SmallDisk
    state_disk: SmallDisk
    nats_disk: SmallDisk
    collector_way: Proxy
    shipper_way: Proxy
    s3_way: Proxy
    user: str
    largest: int
    collector: ServiceProcess
    shippers: list[ServiceProcess]
    capture: dict[str, ServiceProcess]
    begun: list[int] = field(default_factory=list)
    dying: set[int] = field(default_factory=set)
    taken_over: int = 0
    ends: Ends = field(init=False)

    def __post_init__(self) -> None:
        self.ends = Ends(self.bus, self.nats.url, self.bucket, self.spool, self.ledger, self._logs)

    @property
    def services(self) -> list[ServiceProcess]:
        return [self.collector, *self.shippers, *self.capture.values()]

    @property
    def ledger(self) -> Path:
        return self.state_disk.place / "collector"

    def _logs(self) -> str:
        return "\n".join(f"--- {one.name} {one.http}\n{one.log[-4000:]}" for one in self.services)

    async def crash(self, mib: int) -> RealCrash:
        """Let a process with so many MiB in its memory die."""
        process = await victim(mib)
        self.begun.append(process.pid)
        self.dying.add(process.pid)
        try:
            return await crash(process, mib)
        finally:
            self.dying.remove(process.pid)

    # What is in flight

    async def on_bus(self) -> int:
        """Return how many messages wait on the bus; 0 where it does not tell."""
        with suppress(nats.errors.Error, OSError):
            return sum(await on_the_way(self.bus))
        return 0

    async def items(self) -> int:
        """Return how many work items are on the bus; 0 where it does not tell."""
        with suppress(nats.errors.Error, OSError):
            return (await on_the_way(self.bus))[0]
        return 0

    async def given_out(self) -> int:
        """Return how many work items are in shippers' hands; 0 where the bus does not tell."""
        return sum(one.num_ack_pending or 0 for one in await self._consumers(streams.FILES))

    async def untaken_receipts(self) -> int:
        """Return how many receipts the collector has not asked for yet."""
        return sum(one.num_pending or 0 for one in await self._consumers(streams.RECEIPTS))

    async def _consumers(self, stream: str) -> list[ConsumerInfo]:
        with suppress(nats.errors.Error, OSError):
            return list(await self.bus._js.consumers_info(stream))
        return []

    async def watch_acks(self) -> None:
        """Count from now on what shippers acknowledge that was given out before.

        An acknowledgement's subject tells how often its message was given out:
        ``$JS.ACK.<stream>.<consumer>.<times>. …``, nats-server's ADR-15.
        """

        async def count(message: Msg) -> None:
            if message.data in (b"", b"+ACK") and int(message.subject.split(".")[4]) > 1:
                self.taken_over += 1

        await self.bus._client.subscribe(f"$JS.ACK.{streams.FILES}.>", cb=count)

    def undelivered(self) -> int:
        """Return how many crashes the collector knows that are not delivered."""
        return sum('"delivered_at": null' in one for one in _texts(self.ledger, "*.json"))

    def being_captured(self) -> set[int]:
        """Return the PIDs of crashes that a recorder holds, has read, or writes files of."""
        return self.dying | {pid for pid in self.begun if self._is_in_hand(pid)}

    def _is_in_hand(self, pid: int) -> bool:
        """Tell whether a recorder has locked what says so; the locks end with it."""
        records = (self.spool / str(pid)).glob("capture_*")
        return is_unrecorded(self.spool, pid) or any(map(_is_locked, records))

    async def metric(self, service: ServiceProcess, name: str) -> float:
        """Return a metric's sum; 0 where the service does not tell."""
        return sum((await self._samples(service, name)).values())

    async def without_room(self) -> float:
        """Return of how many crashes not all was kept, or the core on the bus alone."""
        recorder = self.capture["recorder"]
        ended = await self._samples(recorder, "crashbus_recorder_captures_total")
        to_bus = await self._samples(recorder, "crashbus_recorder_cores_to_bus_total")
        not_whole = ended['result="truncated"'] + ended['result="failed"']
        return not_whole + to_bus['result="sent"']

    async def failures(self) -> Counter[str]:
        """Return how many tries to deliver have failed, by their reason."""
        found: Counter[str] = Counter()
        for shipper in self.shippers:
            samples = await self._samples(shipper, "crashbus_shipper_failures_total")
            for labels, number in samples.items():
                found[labels.rpartition('reason="')[2].rstrip('"')] += int(number)
        return found

    async def _samples(self, service: ServiceProcess, name: str) -> Counter[str]:
        try:
            return Counter(await asyncio.to_thread(service.samples, name))
        except (OSError, HTTPException):  # it stands still, or was killed just now
            return Counter()

    def done_by_ways(self) -> Counter[str]:
        """Return what all ways have done to what went over them."""
        ways = (self.collector_way, self.shipper_way, self.s3_way)
        return sum((way.done for way in ways), Counter[str]())

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
        await asyncio.gather(*(until(self._works(one), every=0.2) for one in self.services))

    def _works(self, service: ServiceProcess) -> Callable[[], Awaitable[bool]]:
        def look() -> bool:
            try:
                return all(fault.startswith("destination ") for fault in service.faults())
            except (OSError, HTTPException):
                return False

        return lambda: asyncio.to_thread(look)


def _is_locked(record: Path) -> bool:
    with record.open("rb") as file:
        return is_being_written(file.fileno())


def _texts(directory: Path, pattern: str) -> Iterator[str]:
    """Yield the contents of files that may vanish at any moment."""
    for path in directory.glob(pattern):
        with suppress(FileNotFoundError):
            yield path.read_text()
