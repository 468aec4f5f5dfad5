"""The example consumer in a process of its own, on a real server."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from crashbus import Bus, connect
from crashbus.keys import SEED, SERVER
from tests.cli.support import MadeCrash, make
from tests.support.nats import NatsServer, SecuredNats
from tests.support.requirements import need_program

EXAMPLE = Path(__file__).parents[2] / "examples" / "consumer.py"


def test_the_example_is_short_and_needs_the_package_alone() -> None:
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) < 40
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"asyncio", "os", "sys", "crashbus"}


@asynccontextmanager
async def consumer(url: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CRASHBUS_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLE), url),
        env=clean | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_the_example_prints_events_and_receipts(nats_server: NatsServer, bus: Bus) -> None:
    async with consumer(nats_server.url) as process:
        await _prints_all(process, bus)


async def _prints_all(process: asyncio.subprocess.Process, bus: Bus) -> None:
    made = make(destinations=("s3://crashes/eu",))
    publishing = asyncio.create_task(_publish_for_ever(bus, made))
    try:
        assert process.stdout
        wanted = {f"{made.id} web.1 nginx dies of SIGSEGV"}
        wanted |= {f"{made.id} {one.url} {one.file.sha256}" for one in made.receipts()}
        seen: set[str] = set()
        async with asyncio.timeout(20):
            while not wanted <= seen:
                seen.add((await process.stdout.readline()).decode().strip())
        assert seen == wanted
    finally:
        publishing.cancel()


async def _publish_for_ever(bus: Bus, made: MadeCrash) -> None:
    count = 0
    while True:
        count += 1
        await bus.publish(made.event.model_copy(update={"event_id": str(count)}))
        for receipt in made.receipts():
            await bus.publish(receipt)
        await asyncio.sleep(0.1)


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[SecuredNats]:
    """A bus as compose.yaml has it: keys, and on its own host no TLS."""
    need_program("nats-server")
    need_program("openssl")
    server = SecuredNats(tmp_path)
    (server.keys / SERVER / "tls.conf").write_text("")
    server.start()
    yield server
    server.stop()


async def test_the_example_listens_to_a_bus_that_wants_keys(keyed: SecuredNats) -> None:
    url = f"nats://127.0.0.1:{keyed.port}"
    async with connect(url, nkeys_seed=str(keyed.keys / "operator" / SEED)) as bus:
        await bus.ensure_streams()
        key = str(keyed.keys / "consumer" / SEED)
        async with consumer(url, CRASHBUS_NATS_NKEY_FILE=key) as process:
            await _prints_all(process, bus)
    async with consumer(url) as without_key:
        _, said = await asyncio.wait_for(without_key.communicate(), 20)
    assert without_key.returncode == 1
    assert said.startswith(b"consumer: no NATS server answers at nats://127.0.0.1:")
    assert said.count(b"\n") == 1
