"""One Docker engine, one set of images and one running stack for all tests here."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from crashbus import Bus, connect
from tests.compose.stack import Stack
from tests.support import core_pattern
from tests.support.core_pattern import core_pattern_kept
from tests.support.docker import Engine
from tests.support.requirements import need_btf, need_program, need_root

# It leaves the stack otherwise than it found it.
LAST = "test_changing.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave for the end what changes the stack."""
    items.sort(key=lambda item: item.path.name == LAST)


@pytest.fixture(scope="package")
def engine() -> Iterator[Engine]:
    need_root()
    need_btf()
    need_program("dockerd")
    made = Engine()
    yield made
    made.close()


@pytest.fixture(scope="package")
def built(engine: Engine) -> Iterator[Stack]:
    """All images; nothing runs."""
    made = Stack(engine)
    try:
        made.build()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="package")
def stack(built: Stack) -> Iterator[Stack]:
    """Everything, healthy; at the end nothing of it may be left."""
    with core_pattern_kept():
        before = core_pattern.current(), core_pattern.pipe_limit()
        try:
            built.up()
            yield built
        finally:
            built.down()
        assert (core_pattern.current(), core_pattern.pipe_limit()) == before
    assert (
        built.docker("ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project") == ""
    )
    assert built.docker("volume", "ls", "--quiet") == ""
    assert built.docker("network", "ls", "--quiet", "--filter", "name=crashbus") == ""
    assert str(built.directory) not in Path("/proc/self/mountinfo").read_text().replace(
        str(built.engine.socket.parent), ""
    )
    assert {one.name for one in Path("/run/crashbus").iterdir()} <= {"recorder.lock"}


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def bus(stack: Stack) -> AsyncIterator[Bus]:
    async with connect(stack.bus_url, nkeys_seed=str(stack.seed("operator"))) as connected:
        yield connected
