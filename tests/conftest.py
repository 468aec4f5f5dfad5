"""Fixtures for all tests."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest

from crashbus import Bus, connect
from tests.support.core_pattern import core_pattern_kept
from tests.support.nats import NatsServer
from tests.support.requirements import need_program

# How long an example takes says more about the machine than about us.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")

# A real S3 server, started once for all tests that want it.
pytest_plugins = ["tests.support.s3", "tests.faults.report"]


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server of the test's own, running."""
    need_program("nats-server")
    directory = tmp_path / "nats"
    directory.mkdir()
    server = NatsServer(directory)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    """A connection to that server, with all streams made."""
    async with connect(nats_server.url, host="test-host") as connected:
        await connected.ensure_streams()
        yield connected


@pytest.fixture(scope="module")
def core_pattern_held() -> Iterator[None]:
    """The right to change core_pattern, for all tests of a module at once."""
    with core_pattern_kept():
        yield


LONGEST = ("tests/compose/", "tests/faults/")
TAKING_TURNS = ("tests/pipeline/", "tests/recorder/")  # with core_pattern, which one at a time has


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left alone with it at the end; and spread
    those that take turns over all others, so that workers do not wait for each other.
    """
    files = [*dict.fromkeys(map(_file_of, items))]
    places: dict[str, float] = {}
    for taking_turns in (True, False):
        group = [file for file in files if file.startswith(TAKING_TURNS) is taking_turns]
        places |= {file: number / len(group) for number, file in enumerate(group)}

    def place(item: pytest.Item) -> tuple[bool, float, str]:
        file = _file_of(item)
        return not file.startswith(LONGEST), places[file], file

    items.sort(key=place)


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]
