"""The example consumer in a process of its own, on a real server."""

import asyncio
import sys
from pathlib import Path

from crashbus import Bus
from tests.cli.support import MadeCrash, make
from tests.support.nats import NatsServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "consumer.py"


def test_the_example_is_short_and_needs_the_package_alone() -> None:
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) < 30
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"asyncio", "sys", "crashbus"}


async def test_the_example_prints_events_and_receipts(nats_server: NatsServer, bus: Bus) -> None:
    made = make(destinations=("s3://crashes/eu",))
    consumer = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLE), nats_server.url, stdout=asyncio.subprocess.PIPE
    )
    publishing = asyncio.create_task(_publish_for_ever(bus, made))
    try:
        assert consumer.stdout
        wanted = {f"{made.id} web.1 nginx dies of SIGSEGV"}
        wanted |= {f"{made.id} {one.url} {one.file.sha256}" for one in made.receipts()}
        seen = set()
        async with asyncio.timeout(20):
            while not wanted <= seen:
                seen.add((await consumer.stdout.readline()).decode().strip())
        assert seen == wanted
    finally:
        publishing.cancel()
        consumer.kill()
        await consumer.wait()


async def _publish_for_ever(bus: Bus, made: MadeCrash) -> None:
    count = 0
    while True:
        count += 1
        await bus.publish(made.event.model_copy(update={"event_id": str(count)}))
        for receipt in made.receipts():
            await bus.publish(receipt)
        await asyncio.sleep(0.1)
