"""Memory for parts: bounded, and used again."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from crashbus.layout import Kind
from crashbus.parts import CrashFile
from services.shipper.destinations.part_buffer import PartBuffer, PartBuffers
from services.shipper.destinations.s3_upload import Place, Upload
from services.shipper.failure import Passing


def test_buffer_holds_what_was_appended_since_it_was_cleared() -> None:
    buffer = PartBuffer(4)
    buffer.append(b"one")
    assert bytes(buffer.content) == b"one"

    buffer.clear()
    buffer.append(b"two")
    buffer.append(b" and more than was expected")

    assert bytes(buffer.content) == b"two and more than was expected"
    assert len(buffer) == 30


async def test_who_wants_one_more_waits_for_one_that_is_given_back() -> None:
    buffers = PartBuffers(2, 100)
    first, _ = await buffers.take(), await buffers.take()
    first.append(b"part")
    waiting = asyncio.ensure_future(buffers.take())
    await asyncio.sleep(0)
    assert not waiting.done()

    buffers.give_back(first)

    assert await waiting is first
    assert len(first) == 0


async def test_buffer_that_a_request_may_still_read_is_not_used_again() -> None:
    buffers = PartBuffers(2, 100)
    read, _ = await buffers.take(), await buffers.take()
    read.append(b"part")

    buffers.give_back(read, in_use=True)

    assert await buffers.take() is not read
    assert bytes(read.content) == b"part"


async def test_no_memory_is_kept_when_all_are_given_back() -> None:
    buffers = PartBuffers(2, 100)
    only = await buffers.take()

    buffers.give_back(only)

    assert await buffers.take() is not only


def upload(buffers: PartBuffers, **calls: Callable[..., object]) -> Upload:
    """Return one of a file of two parts, to a server that answers as given."""
    server: Any = SimpleNamespace(begin=lambda *_: "upload", unfinished=lambda *_: [], **calls)
    file = CrashFile(
        name="core_1",
        kind=Kind.CORE,
        size=16,
        sha256="0" * 64,
        stored_size=16,
        encoding="zstd",
        chunks=2,
    )
    return Upload(Place(server, "bucket", "key", 8, buffers), file, lambda: None)


async def test_upload_that_ends_before_its_request_began_gives_its_buffer_back() -> None:
    buffers = PartBuffers(1, 8)
    one = upload(buffers)
    await one.write(b"a whole part")

    await one.leave(for_good=False)

    await asyncio.wait_for(buffers.take(), 60)


async def test_memory_of_a_request_that_failed_is_used_again() -> None:
    """Else it stays until Python looks for cycles: hundreds of megabytes at a bad server."""

    def refuse(*_: object) -> str:
        raise ConnectionResetError

    buffers = PartBuffers(2, 8)
    _, other = await buffers.take(), await buffers.take()
    buffers.give_back(other)
    one = upload(buffers, put_part=refuse)
    await one.write(b"a whole part")

    with pytest.raises(Passing):
        await one.complete()
    await one.leave(for_good=False)

    assert await asyncio.wait_for(buffers.take(), 60) is other
