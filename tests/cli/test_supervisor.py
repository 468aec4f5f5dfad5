"""What ``crashbus run`` starts is kept running, whatever is in its way for a moment."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from crashbus.cli.errors import EXIT_SETTINGS, Trouble
from crashbus.cli.supervisor import Command, Supervisor
from tests.support.nats import free_port
from tests.support.requirements import need_program
from tests.support.wait import until


@pytest.fixture
async def together() -> AsyncIterator[Supervisor]:
    made = Supervisor()
    yield made
    await made.stop()


def shell(script: str, log: Path | None = None) -> Command:
    return Command("nats-server", ("sh", "-c", script), os.environ, log)


async def test_what_cannot_be_started_for_a_moment_is_started_later(
    together: Supervisor, tmp_path: Path
) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    started = tmp_path / "started"
    script = f"echo $$ >> {started}; exec sleep 600"

    def pids() -> list[str]:
        return started.read_text().split() if started.exists() else []

    await together.start(shell(script, directory / "log"))
    await until(pids)
    with capture_logs() as said:
        directory.rename(tmp_path / "away")
        os.kill(int(pids()[0]), signal.SIGKILL)
        await until(lambda: any("cannot be started" in one.get("error", "") for one in said))
        (tmp_path / "away").rename(directory)
        await until(lambda: len(pids()) == 2)


async def test_a_server_that_panics_is_started_again(together: Supervisor, tmp_path: Path) -> None:
    started = tmp_path / "started"
    await together.start(shell(f"echo >> {started}; exit {EXIT_SETTINGS}"))
    await until(lambda: started.exists() and len(started.read_text()) == 2)
    assert not together.given_up.done()


async def test_a_server_that_ends_before_it_answers_is_told_with_its_status(
    together: Supervisor,
) -> None:
    await together.start(shell("exit 3"))
    with pytest.raises(Trouble, match="ended with status 3"):
        await together.until_answers("nats-server", f"nats://127.0.0.1:{free_port()}")


async def test_a_server_that_takes_its_time_is_waited_for(
    together: Supervisor, tmp_path: Path
) -> None:
    need_program("nats-server")
    port = free_port()
    script = f"sleep 11; exec nats-server -a 127.0.0.1 -p {port}"
    await together.start(shell(script, tmp_path / "log"))
    url = f"nats://127.0.0.1:{port}"
    await asyncio.wait_for(together.until_answers("nats-server", url), 60)
