"""Cores that are sent while they are still being written."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from crashbus import Manifest, streams
from services.collector import ahead, gather
from services.common import unfinished
from services.common.capture import CapturedFile
from tests.collector.conftest import FILE, Setup
from tests.collector.stand_in import signal_event
from tests.support.records import EPOCH, Writing
from tests.support.wait import until

MIB = 1024 * 1024
SIZE = ahead.LEAST + 3 * MIB + 5
CORE = f"core_{EPOCH}"


class Writer:
    """Writes a set of crash files as the recorder does, as slowly as the test wants."""

    def __init__(self, spool: Path) -> None:
        self._writing = Writing(spool, signal_event(os.getpid()).process)
        self.path, self.crash_id = self._writing.place, self._writing.crash_id
        # Text is what compresses; noise would fill the bus.
        self.content = bytearray(b"%016x" % 7 * (SIZE // 16 + 1))[:SIZE]

    def begin_core(self) -> None:
        self._core = os.open(self.path / CORE, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._core, SIZE)
        unfinished.begin(self._core)

    def write(self, end: int) -> None:
        """Write the core up to some place, and say that it is final."""
        os.pwrite(self._core, self.content[:end], 0)
        unfinished.finished(self._core, end)

    def complete(self, in_order: bool = True) -> None:
        os.close(self._core)
        self._writing.complete({CORE: CapturedFile(size=SIZE, in_order=in_order)})

    def end(self) -> None:
        """Give up all descriptors, as the kernel does for one that was killed."""
        os.close(self._core)
        self._writing.end()


@pytest.fixture
async def shipping(setup: Setup) -> AsyncIterator[None]:
    task = setup.shipper.start()
    yield
    task.cancel()
    await asyncio.wait({task})


async def sent(setup: Setup, writer: Writer) -> int:
    return await setup.bus.chunk_count(writer.crash_id, CORE)


async def begun(setup: Setup, pause: float = 0.0) -> Writer:
    """Return the writer of a core of which the first half lies on the bus already."""
    await setup.collector.start()
    await setup.collector.healthy()
    writer = Writer(setup.spool)
    await asyncio.sleep(pause)
    writer.begin_core()
    writer.write(SIZE // 2)
    # Of text a chunk holds nearly 2 MiB; the last few wait for what comes next.
    most = SIZE // 2 // (2 * MIB) - 6

    async def most_of_it_is_there() -> bool:
        return await sent(setup, writer) >= most

    await until(most_of_it_is_there)
    assert await setup.bus.stored(Manifest) == []
    return writer


async def delivered(setup: Setup, writer: Writer) -> bytes:
    await setup.shipper.has(FILE, CORE, "manifest.json")

    async def no_chunks() -> bool:
        info = await setup.bus._js.stream_info(streams.CHUNKS)
        return info.state.messages == 0

    await until(no_chunks)
    return setup.shipper.content(FILE, CORE)


async def test_core_is_on_the_bus_before_it_is_written_to_its_end(
    setup: Setup, shipping: None
) -> None:
    writer = await begun(setup)
    writer.write(SIZE)
    await until(lambda: setup.collector.metric("crashbus_collector_ahead_total") == 1)
    before = await sent(setup, writer)

    writer.complete()

    assert await delivered(setup, writer) == bytes(writer.content)
    (manifest,) = await setup.bus.stored(Manifest)
    (core,) = manifest.files
    assert (core.size, core.chunks, core.truncated) == (SIZE, before, False)


async def test_core_that_was_written_anew_is_sent_as_it_is_now(
    setup: Setup, shipping: None
) -> None:
    """The memory of the process could not be read to the end: the kernel's stream came instead."""
    writer = await begun(setup)
    writer.content[:8] = b"changed!"
    writer.write(SIZE)
    await until(lambda: setup.collector.metric("crashbus_collector_ahead_total") == 1)

    writer.complete(in_order=False)

    assert await delivered(setup, writer) == bytes(writer.content)


async def test_core_whose_recorder_was_killed_is_sent_as_far_as_it_got(
    setup: Setup, shipping: None
) -> None:
    writer = await begun(setup)

    writer.end()

    core = await delivered(setup, writer)
    assert core == bytes(writer.content[: SIZE // 2]).ljust(SIZE, b"\0")
    (manifest,) = await setup.bus.stored(Manifest)
    assert manifest.files[0].truncated


async def test_collector_that_is_killed_meanwhile_sends_it_again(
    setup: Setup, shipping: None
) -> None:
    writer = await begun(setup)
    setup.collector.kill(signal.SIGKILL)
    await setup.collector.wait()
    writer.write(SIZE)
    writer.complete()

    await setup.collector.start()

    assert await delivered(setup, writer) == bytes(writer.content)


async def test_chunks_of_a_core_that_is_gone_are_taken_back(setup: Setup) -> None:
    writer = await begun(setup)
    setup.collector.kill(signal.SIGKILL)
    await setup.collector.wait()
    writer.end()
    for path in writer.path.iterdir():
        path.unlink()
    assert await sent(setup, writer) > 0

    await setup.collector.start()

    async def none() -> bool:
        return await sent(setup, writer) == 0

    await until(none)
    await until(lambda: not any((setup.state / "collector" / "ahead").iterdir()))


async def test_core_that_comes_late_is_noticed(setup: Setup, shipping: None) -> None:
    writer = await begun(setup, pause=2 * gather.TAKES_LONG)
    writer.write(SIZE)
    writer.complete()

    assert await delivered(setup, writer) == bytes(writer.content)
