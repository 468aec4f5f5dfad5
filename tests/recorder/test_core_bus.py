"""A core that goes straight to the bus: what it is, and what becomes of it when things go wrong."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from crashbus import Bus, crash_id
from crashbus.chunks import Verifier
from crashbus.parts import CrashFile
from services.common import core_stream
from services.common.core_stream import Announced
from services.recorder.core import core_bus, core_copy, core_filter
from services.recorder.core.core_bus import BusWay, NotSent
from services.recorder.core.core_memory import LiveMemory
from services.recorder.core.core_pages import Pages
from services.recorder.core.core_writing import _with_notes
from tests.pipeline.conftest import top_frames
from tests.recorder.test_core_pages import SMALL_PYTHON, Crash, same
from tests.support import core_pattern
from tests.support.crashers import crasher
from tests.support.nats import NatsServer
from tests.support.records import EPOCH, Writing, process
from tests.support.requirements import need_linux
from tests.support.service import ServiceProcess

MIB = 1024 * 1024
PID = 4_000_001
DIRECTORY, NAME = str(PID), f"core_{EPOCH}"  # in the spool
CRASH_ID = crash_id("boot", PID, 1)


class Collector:
    """A real collector, and what it has put on the bus."""

    def __init__(self, bus: Bus, directory: Path, nats: NatsServer) -> None:
        self.bus = bus
        self.spool = directory / "appscope"
        self.service = ServiceProcess(
            "collector",
            directory,
            {
                "CRASHBUS_NATS_URL": nats.url,
                "CRASHBUS_HOST": "test-host",
                "CRASHBUS_SPOOL": str(self.spool),
                "CRASHBUS_STATE": str(directory / "state"),
                "CRASHBUS_DESTINATIONS": "file:///delivered",
            },
        )

    async def content(self, file: CrashFile, path: Path) -> None:
        """Write what the bus has to a file; its hash is checked."""
        verifier = Verifier(file.encoding)
        with path.open("wb") as out:
            async for chunk in self.bus.chunks(CRASH_ID, NAME, file.chunks):
                out.write(verifier.accept(chunk))
        verifier.finish(file.size, file.sha256)


@pytest.fixture
async def collector(tmp_path: Path, nats_server: NatsServer, bus: Bus) -> AsyncIterator[Collector]:
    made = Collector(bus, tmp_path, nats_server)
    await made.service.start()
    await made.service.healthy()
    # Without a record that is being written, the collector takes the core back.
    writing = Writing(made.spool, process(PID))
    yield made
    writing.end()
    await made.service.stop()


@pytest.fixture
def coredump_socket(tmp_path: Path, core_pattern_held: None) -> Iterator[socket.socket]:
    """Where the kernel sends cores, while the test lasts."""
    need_linux((6, 17), "the coredump socket's request")
    place = tmp_path.resolve() / "run"
    place.mkdir(0o700)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / "s"))
        listening.listen(8)
        listening.settimeout(60)
        before = core_pattern.current()
        core_pattern.set_pattern(f"@@{place / 's'}")
        yield listening
        core_pattern.set_pattern(before)


def way(spool: Path, patience: float = 60) -> BusWay:
    return BusWay(spool, patience, 600, always=True)


def send(crash: Crash, to: BusWay, place: Path, limit: int = core_copy.LARGEST) -> core_bus.Sent:
    """Send a crash's core as the recorder does."""
    pages = _with_notes(Pages(crash.pid, crash.head, crash.maps), crash.hold)
    crash.head = pages.head
    announced = Announced(crash_id=CRASH_ID, directory=DIRECTORY, name=NAME)
    notes = os.open(place, os.O_RDWR | os.O_CREAT)
    try:
        core_copy.copy_stacks(crash.hold, pages, notes, MIB)
        return core_bus.send(crash.hold, to, announced, pages, notes, limit, stacks_only=False)
    finally:
        os.close(notes)


@pytest.mark.parametrize("command", [("threads",), ("many_mappings",), SMALL_PYTHON])
async def test_core_on_the_bus_is_the_kernels(
    coredump_socket: socket.socket, collector: Collector, tmp_path: Path, command: tuple[str, ...]
) -> None:
    program = [crasher(command[0])] if len(command) == 1 else list(command)
    crash = await asyncio.to_thread(Crash, coredump_socket, *program)
    try:
        sent = await asyncio.to_thread(send, crash, way(collector.spool), tmp_path / "stacks")
        crash.from_stream(tmp_path / "kernels")
    finally:
        crash.end()

    assert sent.size == sent.file.size == crash.head.size
    assert sent.missing == 0
    await collector.content(sent.file, tmp_path / "ours")
    assert same(tmp_path / "ours", tmp_path / "kernels")


async def test_core_on_the_bus_has_what_the_filter_lets_in(
    coredump_socket: socket.socket, collector: Collector, tmp_path: Path
) -> None:
    command = (crasher("kinds"), "0x1ff", tmp_path / "file")
    crash = await asyncio.to_thread(Crash, coredump_socket, *command)
    try:
        whole = crash.head.size
        crash.head = core_filter.narrowed(Pages(crash.pid, crash.head, crash.maps), 0x31)
        sent = await asyncio.to_thread(send, crash, way(collector.spool), tmp_path / "stacks")
    finally:
        crash.end()

    await collector.content(sent.file, tmp_path / "ours")
    assert whole is not None and sent.file.size == crash.head.size and sent.file.size < whole
    content = (tmp_path / "ours").read_bytes()
    assert content.count(b"private-memory") >= MIB / 16
    assert content.count(b"shared-memory") < 10  # the program has the words, too
    assert "crash_here" in top_frames(crasher("kinds"), tmp_path / "ours")


async def test_core_over_its_limit_is_laid_out_anew(
    coredump_socket: socket.socket, collector: Collector, tmp_path: Path
) -> None:
    crash = await asyncio.to_thread(Crash, coredump_socket, crasher("large"), "16")
    try:
        to = way(collector.spool)
        sent = await asyncio.to_thread(send, crash, to, tmp_path / "stacks", 4 * MIB)
    finally:
        crash.end()

    await collector.content(sent.file, tmp_path / "ours")
    assert sent.file.size == sent.size <= 4 * MIB
    assert sent.missing > 12 * MIB
    assert "crash_here" in top_frames(crasher("large"), tmp_path / "ours")


async def test_process_that_is_killed_meanwhile_leaves_what_was_read(
    coredump_socket: socket.socket,
    collector: Collector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crash = await asyncio.to_thread(Crash, coredump_socket, crasher("large"), "16")
    try:
        reads = 0

        def read(self: LiveMemory, into: memoryview, address: int) -> int:
            nonlocal reads
            reads += len(into) == MIB
            if reads == 8:
                crash.process.kill()
                crash.process.wait(60)
            return as_before(self, into, address)

        as_before = LiveMemory.read
        monkeypatch.setattr(LiveMemory, "read", read)
        sent = await asyncio.to_thread(send, crash, way(collector.spool), tmp_path / "stacks")
    finally:
        crash.end()

    assert crash.head.data < sent.file.size < sent.size == crash.head.size
    await collector.content(sent.file, tmp_path / "ours")


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A spool with the socket of a collector that has ended."""
    spool = tmp_path / "appscope"
    core_stream.listen(spool).close()
    return spool


async def test_who_finds_the_way_blocked_does_not_wait(
    coredump_socket: socket.socket, left: Path, tmp_path: Path
) -> None:
    crash = await asyncio.to_thread(Crash, coredump_socket, crasher("threads"))
    to = way(left, patience=0.1)
    try:
        with pytest.raises(NotSent, match="the collector takes no cores"):
            await asyncio.to_thread(send, crash, to, tmp_path / "one")
        to.patience = 3600
        to.block()
        with pytest.raises(NotSent, match="it took no core a moment ago"):
            await asyncio.to_thread(send, crash, to, tmp_path / "two")
    finally:
        crash.end()


async def test_process_that_was_let_go_is_not_waited_for(
    coredump_socket: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = await asyncio.to_thread(Crash, coredump_socket, crasher("threads"))

    def connect(*_: object) -> socket.socket:
        crash.hold.let_go("it was stopped")
        raise ConnectionRefusedError

    monkeypatch.setattr(core_stream, "connect", connect)
    try:
        with pytest.raises(NotSent, match="it was stopped"):
            await asyncio.to_thread(send, crash, way(tmp_path), tmp_path / "stacks")
    finally:
        crash.end()
