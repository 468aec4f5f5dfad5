"""One Docker engine, one set of images and one running stack for all tests here."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from crashbus import Bus, connect
from tests.compose import readme
from tests.compose.readme import Walk
from tests.compose.stack import Stack
from tests.support import core_pattern
from tests.support.core_pattern import core_pattern_kept
from tests.support.docker import Engine
from tests.support.former import Former
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
def former() -> Iterator[Former]:
    """Who has core_pattern before."""
    made = Former()
    yield made
    made.close()


@pytest.fixture(scope="package")
def built(engine: Engine) -> Iterator[Stack]:
    """All images; nothing runs."""
    made = Stack(engine)
    try:
        made.prepare()
        made.compose("build", "--quiet")
        yield made
    finally:
        made.close()


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def walked(built: Stack, former: Former) -> AsyncIterator[Walk]:
    """Started as the README tells; at the end nothing of it may be left."""
    with core_pattern_kept():
        core_pattern.set_pattern(former.pattern("keeps"))
        before = core_pattern.current(), core_pattern.pipe_limit()
        try:
            yield await readme.walk(built)
            # All that the README tells to stop it: its volumes are left.
            built.must(readme.STOP)
            assert (core_pattern.current(), core_pattern.pipe_limit()) == before
            nothing_runs(built)
        finally:
            built.compose("down", "--volumes")
    assert built.docker("volume", "ls", "--quiet") == ""


def nothing_runs(stack: Stack) -> None:
    of_compose = ("--quiet", "--filter", "label=com.docker.compose.project")
    assert stack.docker("ps", "--all", *of_compose) == ""
    assert stack.docker("network", "ls", *of_compose) == ""
    assert str(stack.directory) not in Path("/proc/self/mountinfo").read_text()
    assert {one.name for one in Path("/run/crashbus").iterdir()} <= {"recorder.lock"}


@pytest.fixture(scope="package")
def stack(walked: Walk) -> Stack:
    """Everything, healthy; also the graphs' side, as the README says."""
    profiles = "s/^COMPOSE_PROFILES=.*/COMPOSE_PROFILES=storage,metrics/"
    walked.stack.must(f"sed --in-place {profiles} .env")
    walked.stack.up()
    return walked.stack


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def bus(stack: Stack) -> AsyncIterator[Bus]:
    async with connect(stack.bus_url, nkeys_seed=str(stack.seed("operator"))) as connected:
        yield connected
