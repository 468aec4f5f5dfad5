"""Services are killed or cut off: nothing is lost, and health tells of it."""

import asyncio
import os
import signal
from contextlib import suppress

import pytest

from crashbus import Bus
from tests.compose.delivery import WHOLE, WITHIN, check_contents, delivered, healthy
from tests.compose.stack import Stack
from tests.support.docker import IMAGE
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="package")

STORM = 20  # containers
WORKING = ("detector", "recorder", "collector", "shipper")


async def test_storm_with_every_service_killed_in_its_middle_loses_nothing(
    stack: Stack, bus: Bus
) -> None:
    crashing = asyncio.Semaphore(3)

    async def crash() -> str:
        async with crashing:
            return await asyncio.to_thread(stack.engine.run, "--rm", IMAGE, "/null_pointer")

    storm = [asyncio.create_task(crash()) for _ in range(STORM)]
    for number, service in enumerate(("collector", "shipper", "nats", "detector", "recorder")):
        await until(lambda n=number: sum(one.done() for one in storm) > 3 * n)  # type: ignore[misc]
        (container, *_) = stack.containers(service)
        killed = stack.pid(container)
        with suppress(ProcessLookupError):
            os.kill(killed, signal.SIGKILL)
        # The engine starts it again by itself.
        await until(lambda c=container, k=killed: stack.pid(c) not in (0, k), WITHIN, every=0.5)  # type: ignore[misc]

    crashed = await asyncio.gather(*storm)
    await healthy(stack, "nats")
    await until(lambda: bus.is_connected)
    for container in crashed:
        manifest, receipts = await delivered(stack, bus, container)
        # One that was held by the recorder that was killed may be cut short, and says so.
        assert {file.kind for file in manifest.files} >= WHOLE or manifest.notes
        await asyncio.to_thread(check_contents, stack, receipts)


async def test_services_that_need_the_bus_are_unhealthy_while_it_is_gone(stack: Stack) -> None:
    await healthy(stack, *WORKING)
    (nats,) = stack.containers("nats")

    stack.docker("stop", nats)

    for service in ("detector", "collector", "shipper"):
        for one in stack.containers(service):
            await until(lambda c=one: "bus" in stack.fault(c), every=0.5)  # type: ignore[misc]
    await healthy(stack, "recorder")  # which captures without it
    stack.docker("start", nats)
    await healthy(stack, "nats", *WORKING)
