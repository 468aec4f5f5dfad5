"""What the benchmarks of the delivery measure: the services as they are by default."""

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from minio import Minio

from crashbus import Bus, Receipt, connect
from tests.faults.crashes import CrashSet, write_set
from tests.support.core_pattern import core_pattern_kept
from tests.support.nats import NatsServer
from tests.support.proxy import Proxy
from tests.support.s3 import S3Server
from tests.support.service import ServiceProcess
from tests.support.wait import until

HOST = "bench"
CAPTURE = ("recorder", "detector")
MIB = 1024 * 1024
WITHIN = 1800.0  # seconds


@dataclass
class Pipeline:
    """What runs.

    Attributes:
        scratch: a directory on the spool's disk.
        shipper_way: the shippers' way to the bus.
        processes: the processes at work in each part.
    """

    bus: Bus
    scratch: Path
    spool: Path
    s3: Minio
    bucket: str
    collector: ServiceProcess
    shippers: list[ServiceProcess]
    shipper_way: Proxy
    capture: list[ServiceProcess]
    processes: Callable[[], dict[str, list[int]]]

    async def receipts(self, crash: CrashSet, *kinds: str) -> list[Receipt]:
        """Return the receipts of a crash's files once there is one for each kind."""

        async def look() -> list[Receipt]:
            found = await self.bus.stored(Receipt, f"crash.shipped.*.{crash.crash_id}")
            wanted = [one for one in found if one.file.kind in kinds]
            return wanted if len(wanted) >= len(kinds) else []

        return await until(look, WITHIN, every=0.05)

    def hand_over(self, core: Path, seed: int) -> CrashSet:
        """Put a set with a copy of this core into the spool, all at once."""
        hidden = self.scratch / "hidden"
        hidden.mkdir()
        crash = write_set(hidden, HOST, _pieces(core), Random(seed))
        (made,) = hidden.iterdir()
        made.rename(self.spool / made.name)
        hidden.rmdir()
        return crash


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(MIB):
            yield piece


@contextmanager
def s3_server(address: str = "127.0.0.1", there: Sequence[str] = ()) -> Iterator[S3Server]:
    """Start the real S3 server of the tests, and end it, also when we are told to end.

    Args:
        address: where it listens.
        there: a command that runs a command where it is to be.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="bench-s3-") as place:
        server = S3Server(Path(place), address, there)
        try:
            server.start()
            yield server
        finally:
            server.stop()


@asynccontextmanager
async def running(
    s3: S3Server,
    *,
    shippers: int = 1,
    s3_port: int = 0,
    real: bool = False,
    proxied: bool = False,
    **settings: str,
) -> AsyncIterator[Pipeline]:
    """Start a pipeline, and end it.

    Args:
        s3_port: of a way to the S3 server; 0: straight to it.
        real: with recorder and detector.
        proxied: the shippers have a way to the bus that can be made silent.
        settings: of the services, without their prefix.
    """
    async with AsyncExitStack() as stack:
        if real:
            stack.enter_context(core_pattern_kept())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        scratch.chmod(0o755)
        server = NatsServer(scratch)
        server.start()
        stack.callback(server.stop)
        way = Proxy(server.port)
        stack.callback(way.close)
        bus = await stack.enter_async_context(connect(server.url))
        bucket = s3.make_bucket()
        environment = _environment(scratch, server, bucket, s3, s3_port)
        environment |= {f"CRASHBUS_{name.upper()}": value for name, value in settings.items()}
        through = {"CRASHBUS_NATS_URL": f"nats://127.0.0.1:{way.port}"} if proxied else {}
        made = Pipeline(
            bus=bus,
            scratch=scratch,
            spool=_spool(scratch),
            s3=s3.client(),
            bucket=bucket,
            collector=ServiceProcess("collector", scratch, environment),
            shippers=_shippers(shippers, scratch, environment | through),
            shipper_way=way,
            capture=[ServiceProcess(name, scratch, environment) for name in CAPTURE if real],
            processes=lambda: _processes(made, server, s3),
        )
        async with _started(made):
            yield made


def _environment(
    scratch: Path, server: NatsServer, bucket: str, s3: S3Server, s3_port: int
) -> dict[str, str]:
    return {
        "CRASHBUS_NATS_URL": server.url,
        "CRASHBUS_HOST": HOST,
        "CRASHBUS_LOG_LEVEL": "info",
        "CRASHBUS_SPOOL": str(scratch / "appscope"),
        "CRASHBUS_STATE": str(scratch / "state"),
        "CRASHBUS_DESTINATIONS": f"s3://{bucket}/crashes",
        "CRASHBUS_RECORDER_SOCKET": str(scratch / "run" / "s"),
        **s3.settings(),
        **({"CRASHBUS_SHIPPER_S3_ENDPOINT": f"http://127.0.0.1:{s3_port}"} if s3_port else {}),
    }


def _processes(made: Pipeline, server: NatsServer, s3: S3Server) -> dict[str, list[int]]:
    return {
        "collector": [made.collector.pid],
        "shipper": [shipper.pid for shipper in made.shippers],
        "nats-server": [server.pid],
        "S3 server": s3.pids,
        "client": [os.getpid()],
    }


def _spool(scratch: Path) -> Path:
    spool = scratch / "appscope"
    spool.mkdir()
    spool.chmod(0o1777)
    return spool


def _shippers(count: int, scratch: Path, environment: dict[str, str]) -> list[ServiceProcess]:
    places = [scratch / f"shipper-{number}" for number in range(count)]
    for place in places:
        place.mkdir()
    return [ServiceProcess("shipper", place, environment) for place in places]


@asynccontextmanager
async def _started(made: Pipeline) -> AsyncIterator[None]:
    """Have all services run; at the end remove what they delivered."""
    services = [made.collector, *made.shippers, *made.capture]
    try:
        for service in services:
            await service.start()
        await asyncio.gather(*(service.healthy(120) for service in services))
        yield
    finally:
        made.shipper_way.restore()
        await asyncio.gather(*(service.stop() for service in services))
        for key in made.s3.list_objects(made.bucket, recursive=True):
            made.s3.remove_object(made.bucket, str(key.object_name))


def peak_of(service: ServiceProcess) -> int:
    """Return the most memory that a process had resident since it was last asked, in bytes."""
    status = Path(f"/proc/{service.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    Path(f"/proc/{service.pid}/clear_refs").write_text("5")  # proc(5): starts VmHWM anew
    return int(line.split()[1]) * 1024


class Processors:
    """What processes use of the processors from now on."""

    def __init__(self, processes: dict[str, list[int]]) -> None:
        self._processes = processes
        self._before, self._idle_before = self._used(), _idle_and_all()

    def seconds(self) -> dict[str, float]:
        """Return the processor seconds of each part."""
        return {name: used - self._before[name] for name, used in self._used().items()}

    def idle(self) -> float:
        """Return the share of all processors' time that nobody used, others on the host neither."""
        idle, everything = _idle_and_all()
        return (idle - self._idle_before[0]) / max(1, everything - self._idle_before[1])

    def _used(self) -> dict[str, float]:
        return {
            name: sum(_processor_seconds(pid) for pid in pids)
            for name, pids in self._processes.items()
        }


def _processor_seconds(pid: int) -> float:
    # clock_getcpuclockid(3): the clock of another process, exact where proc(5) counts ticks.
    return time.clock_gettime((~pid << 3) | 2)


def _idle_and_all() -> tuple[int, int]:
    fields = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)  # proc_stat(5): idle and iowait


def table(headings: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Print a Markdown table."""
    for row in (headings, ("---", *("---:" for _ in headings[1:])), *rows):
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


def plot(values: list[tuple[str, float]], unit: str) -> None:
    """Print a bar for each value."""
    width, largest = max(len(name) for name, _ in values), max(value for _, value in values)
    for name, value in values:
        print(f"{name:>{width}} {'█' * max(1, round(40 * value / largest))} {value:.3g} {unit}")


def seconds(since: float) -> float:
    """Return the seconds that went by since a monotonic time."""
    return time.monotonic() - since
