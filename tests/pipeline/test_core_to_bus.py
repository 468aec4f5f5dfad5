"""Cores that go straight to the bus: real crashes, recorder, collector, shipper and bus."""

import asyncio
import hashlib
import os
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import asyncinotify
import nats.errors
import nats.js.errors
import pytest
import zstandard
from asyncinotify import Inotify, Mask

from crashbus import Bus, Manifest, connect, streams
from crashbus.layout import CORES, Kind
from crashbus.parts import CrashFile
from tests.pipeline.conftest import top_frames
from tests.support.crashers import crasher
from tests.support.disk import SmallDisk, immutable, small_disk
from tests.support.nats import NatsServer
from tests.support.requirements import need_root
from tests.support.service import ServiceProcess
from tests.support.wait import stop, until

MIB = 1024 * 1024
LARGE = 48  # MiB
FILLER = "crash.chunk.filler.x"
SERVICES = ("recorder", "collector", "shipper")


@dataclass
class Stack:
    """All services, with a spool of which whatever is made is noted."""

    bus: Bus
    nats: NatsServer
    disk: SmallDisk
    spool: Path
    delivered: Path
    services: dict[str, ServiceProcess]
    made: set[Path] = field(default_factory=set)

    @property
    def recorder(self) -> ServiceProcess:
        return self.services["recorder"]

    @property
    def collector(self) -> ServiceProcess:
        return self.services["collector"]

    async def manifest(self, pid: int) -> Manifest:
        """Return the manifest of a crash when the destination has all that it names."""

        async def look() -> Manifest | None:
            for one in reversed(await self.bus.stored(Manifest)):
                if one.process.pid == pid and (self._folder(one) / "manifest.json").exists():
                    return one
            return None

        try:
            return await until(look, 90, every=0.1)
        except TimeoutError:
            raise TimeoutError(self.logs()) from None

    def _folder(self, manifest: Manifest) -> Path:
        return self.delivered / manifest.folder

    def core(self, manifest: Manifest) -> tuple[CrashFile, Path]:
        """Return what is said of a core, and the core as the destination has it, unpacked."""
        (file,) = [one for one in manifest.files if one.kind is Kind.CORE]
        stored = self._folder(manifest) / file.stored_name
        unpacked = self.delivered / "unpacked"
        with stored.open("rb") as packed, unpacked.open("wb") as out:
            zstandard.ZstdDecompressor().copy_stream(packed, out, read_size=MIB)
        with unpacked.open("rb") as whole:
            assert hashlib.file_digest(whole, "sha256").hexdigest() == file.sha256
        return file, unpacked

    async def has_no_chunks(self, besides: int = 0) -> bool:
        return (await self.bus._js.stream_info(streams.CHUNKS)).state.messages == besides

    async def leave_room(self) -> None:
        """Leave room on the bus for half of a large core."""
        for _ in range(LARGE):
            await self.bus.publish_raw(FILLER, os.urandom(MIB - 4096))
        config = (await self.bus._js.stream_info(streams.CHUNKS)).config
        config.max_bytes = (LARGE + LARGE // 2) * MIB
        await self.bus._js.update_stream(config)

    async def is_half_sent(self) -> None:
        """Wait until the bus is full; what is still to come of the core waits, then."""

        await until(lambda: self.collector.metric("crashbus_collector_bus_full_total") > 0)

    async def make_room(self) -> None:
        """Take off the bus what was in the way."""
        await until(self._has_purged)

    async def _has_purged(self) -> bool:
        try:
            await self.bus._js.purge_stream(streams.CHUNKS, subject=FILLER)
        except (nats.errors.Error, nats.js.errors.Error):  # it was just started
            return False
        return True

    async def watch(self) -> None:
        """Note whatever is made in the spool."""
        with Inotify() as inotify:
            watched: dict[asyncinotify.Watch, Path] = {}
            watched[inotify.add_watch(self.spool, Mask.CREATE | Mask.MOVED_TO)] = self.spool
            async for event in inotify:
                path = watched[event.watch] / str(event.name) if event.watch else None
                if path is None:
                    continue
                self.made.add(path)
                with suppress(OSError):  # others crash here too, and their directories go
                    if path.is_dir() and path.parent == self.spool:
                        watched[inotify.add_watch(path, Mask.CREATE | Mask.MOVED_TO)] = path
                        self.made.update(path.iterdir())

    def logs(self) -> str:
        return "\n".join(f"--- {s.name}\n{s.log[-3000:]}" for s in self.services.values())


MakeStack = Callable[..., Awaitable[Stack]]


@pytest.fixture
async def stack_with(core_pattern_held: None) -> AsyncIterator[MakeStack]:
    """Make a stack whose recorder has these settings."""
    need_root()
    async with AsyncExitStack() as stack:
        # A socket's path is bounded, so not below pytest's own long directories.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cb-", dir="/tmp")))
        scratch.chmod(0o755)
        disk = stack.enter_context(small_disk(scratch / "disk", 64))

        async def make(*limits: str, **settings: object) -> Stack:
            (scratch / "nats").mkdir()
            nats = NatsServer(scratch / "nats")
            nats.start()
            stack.callback(nats.stop)
            bus = await stack.enter_async_context(connect(nats.url, host="test-host"))
            delivered = scratch / "delivered"
            delivered.mkdir()
            environment = {
                "CRASHBUS_NATS_URL": nats.url,
                "CRASHBUS_HOST": "test-host",
                "CRASHBUS_STATE": str(scratch / "state"),
                "CRASHBUS_SPOOL": str(disk.place / "appscope"),
                "CRASHBUS_DESTINATIONS": f"file://{delivered}",
                "CRASHBUS_RECORDER_SOCKET": str(scratch / "run" / "s"),
                "CRASHBUS_COLLECTOR_RECHECK": "1",
                "CRASHBUS_COLLECTOR_RECORDER_PATIENCE": "5",
                "CRASHBUS_COLLECTOR_DISK_RESERVE": "0",
                "CRASHBUS_SHIPPER_ACK_WAIT": "4",
            } | {f"CRASHBUS_RECORDER_{key.upper()}": str(one) for key, one in settings.items()}
            services = {
                name: ServiceProcess(
                    name, scratch, environment, limits if name == "recorder" else ()
                )
                for name in SERVICES
            }
            made = Stack(bus, nats, disk, disk.place / "appscope", delivered, services)
            for service in services.values():
                await service.start()
                stack.push_async_callback(service.stop)
            await asyncio.gather(*(service.healthy() for service in services.values()))
            await until(lambda: (made.spool / CORES / "socket").exists())
            watching = asyncio.create_task(made.watch())
            stack.callback(watching.cancel)
            return made

        yield make


async def crash_of(mib: int) -> "asyncio.subprocess.Process":
    """Start a process that crashes with so many MiB that do not compress."""
    return await asyncio.create_subprocess_exec(crasher("large"), str(mib))


async def ended(process: "asyncio.subprocess.Process") -> int:
    """Wait until a process is let go, and return its PID."""
    await asyncio.wait_for(process.wait(), 60)
    return process.pid


def cores(stack: Stack, *pids: int) -> list[int]:
    """Return which of these crashes have a core in the spool, or had one."""
    there = stack.made | set(stack.spool.glob("*/core_*"))
    places = {path.parent.name for path in there if path.name.startswith("core_")}
    return [pid for pid in pids if str(pid) in places]


async def test_core_is_delivered_with_no_copy_in_the_spool(stack_with: MakeStack) -> None:
    # A file of more than 8 MiB is more than this recorder could write.
    stack = await stack_with("prlimit", f"--fsize={8 * MIB}", core_to="bus")
    giant = await asyncio.create_subprocess_exec(crasher("sparse_giant"))

    small = await ended(await asyncio.create_subprocess_exec(crasher("threads"), "40"))
    large = await ended(await crash_of(LARGE))

    for pid, program in ((small, "threads"), (large, "large")):
        file, core = stack.core(await stack.manifest(pid))
        assert (file.truncated, file.note) == (False, None)
        assert "crash_here" in top_frames(crasher(program), core)
        (trace,) = (stack.spool / str(pid)).glob("backtrace_*.json")
        assert "crash_here" in trace.read_text()
    assert file.size > LARGE * MIB
    assert not cores(stack, small, large)
    assert {path.name.partition("_")[0] for path in stack.made} >= {"info", "backtrace", "snapshot"}
    assert stack.collector.metric("crashbus_collector_streamed_total") >= 2
    assert giant.pid == await ended(giant) and giant.returncode == -signal.SIGKILL
    await until(stack.has_no_chunks)


async def test_core_that_finds_no_room_on_disk_goes_to_the_bus(stack_with: MakeStack) -> None:
    stack = await stack_with(mechanism="pipe")  # auto is the default
    stack.disk.fill(leaving=24 * MIB)

    small = await ended(await crash_of(1))
    first = await ended(await crash_of(LARGE))
    stack.disk.fill(leaving=8 * MIB)  # now the stacks are kept in memory
    second = await ended(await crash_of(LARGE))

    file, _ = stack.core(await stack.manifest(small))
    assert not file.truncated
    for pid in (first, second):
        file, core = stack.core(await stack.manifest(pid))
        assert (file.truncated, file.note) == (False, None)
        assert "crash_here" in top_frames(crasher("large"), core)
        (trace,) = (stack.spool / str(pid)).glob("backtrace_*.json")
        assert "crash_here" in trace.read_text()
    assert cores(stack, small, first, second) == [small]


async def test_collector_or_bus_that_ends_in_the_middle_costs_time_alone(
    stack_with: MakeStack,
) -> None:
    stack = await stack_with(core_to="bus", core_to_patience=120)
    await stack.leave_room()
    first = await crash_of(LARGE)
    await stack.is_half_sent()

    stack.collector.kill()
    await stack.collector.wait()
    await stack.collector.start()
    await stack.make_room()
    whole = [await ended(first)]
    await stack.manifest(whole[0])
    await until(stack.has_no_chunks)
    await stack.leave_room()
    second = await crash_of(LARGE)
    await stack.is_half_sent()
    stack.nats.kill()
    stack.nats.start()
    await stack.make_room()
    whole.append(await ended(second))

    for pid in whole:
        file, core = stack.core(await stack.manifest(pid))
        assert (file.truncated, file.note) == (False, None)
        assert file.size > LARGE * MIB
        assert "crash_here" in top_frames(crasher("large"), core)
    assert not cores(stack, *whole)


async def test_without_a_collector_the_stacks_are_kept(stack_with: MakeStack) -> None:
    stack = await stack_with(core_to="bus", core_to_patience=1)
    await stop(stack.collector.pid)
    first = await ended(await crash_of(LARGE))
    stack.collector.kill(signal.SIGCONT)
    await stack.collector.stop()
    second = await ended(await crash_of(LARGE))

    await stack.collector.start()

    for pid in (first, second):
        file, core = stack.core(await stack.manifest(pid))
        assert file.truncated
        assert "only the stacks were kept: the bus did not take it" in (file.note or "")
        assert file.size < MIB < (file.expected_size or 0)
        assert "crash_here" in top_frames(crasher("large"), core)


async def test_core_that_the_full_bus_does_not_take_leaves_its_stacks(
    stack_with: MakeStack,
) -> None:
    stack = await stack_with(core_to="bus", core_to_patience=2)
    await stack.leave_room()

    pid = await ended(await crash_of(LARGE))

    await stack.make_room()
    file, core = stack.core(await stack.manifest(pid))
    assert file.truncated
    assert "only the stacks were kept: the bus did not take it" in (file.note or "")
    assert file.expected_size is not None
    assert file.expected_size > LARGE * MIB
    assert "crash_here" in top_frames(crasher("large"), core)
    await until(stack.has_no_chunks)


async def test_core_whose_record_cannot_be_kept_leaves_its_stacks(stack_with: MakeStack) -> None:
    """The bus has the core, and nobody could ever know that it does."""
    stack = await stack_with(core_to="bus", core_to_patience=120)
    await stack.leave_room()
    large = await crash_of(LARGE)
    await stack.is_half_sent()
    (record,) = (stack.spool / str(large.pid)).glob("capture_*")

    with immutable(record):
        await stack.make_room()
        # What it noted of the core, and then that there is none.
        await until(lambda: stack.recorder.log.count("record could not be written") >= 2)
    pid = await ended(large)

    file, core = stack.core(await stack.manifest(pid))
    assert file.truncated
    assert file.size < MIB
    assert "crash_here" in top_frames(crasher("large"), core)
    assert stack.collector.metric("crashbus_collector_streamed_total") >= 1
    await until(stack.has_no_chunks)


async def test_core_reaches_its_destination_where_no_other_file_can_be_made(
    stack_with: MakeStack,
) -> None:
    stack = await stack_with()
    await stack.manifest(await ended(await crash_of(1)))  # what is made once is there

    found = await stack.manifest(await captured_with_two_inodes(stack))

    file, core = stack.core(found)
    assert found.files == (file,)
    assert (file.truncated, file.note) == (False, None)
    assert "crash_here" in top_frames(crasher("large"), core)
    for kind in (Kind.INFO, Kind.BACKTRACE, Kind.SNAPSHOT):
        assert any(f"{kind}_" in note and "No space left" in note for note in found.notes)
    await until(stack.has_no_chunks)


async def captured_with_two_inodes(stack: Stack) -> int:
    """Return the PID of a crash that had inodes for its directory and its record alone."""

    async def captured() -> int | None:
        failed = stack.recorder.log.count("a crash was not captured")
        stack.disk.take_inodes(leaving=2)
        pid = await ended(await crash_of(LARGE))

        def settled() -> bool:
            return is_captured(pid) or stack.recorder.log.count("a crash was not captured") > failed

        await until(settled)
        return pid if is_captured(pid) else None  # another's crash may have taken them

    def is_captured(pid: int) -> bool:
        return re.search(f"captured .* pid={pid} ", stack.recorder.log) is not None

    return await until(captured)


async def test_what_a_killed_recorder_left_on_the_bus_is_taken_back(
    stack_with: MakeStack,
) -> None:
    stack = await stack_with(core_to="bus", core_to_patience=120)
    await stack.leave_room()
    large = await crash_of(LARGE)
    await stack.is_half_sent()

    stack.recorder.kill()
    pid = await ended(large)

    manifest = await stack.manifest(pid)
    assert not [file for file in manifest.files if file.kind is Kind.CORE]
    assert any("on its way to the bus when the recorder ended" in note for note in manifest.notes)
    await until(lambda: stack.has_no_chunks(besides=LARGE))
