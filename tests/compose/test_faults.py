"""Services are killed or cut off: nothing is lost, and health tells of it."""

import asyncio
import os
import signal
from contextlib import suppress

import pytest

from crashbus import Bus
from tests.compose.delivery import WHOLE, WITHIN, check_contents, delivered, healthy
from tests.compose.stack import Stack
from tests.support.docker import IMAGE, child_of
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="package")

STORM = 20  # containers
WORKING = ("detector", "recorder", "collector", "shipper")


async def waiting_containers(stack: Stack) -> dict[str, int]:
    """Start containers whose programs wait for a signal, below an init.

    Returns:
        container to its program's PID.
    """
    starting = asyncio.Semaphore(4)
    options = ("--detach", "--rm", "--init", "--network", "none")

    async def start() -> tuple[str, int]:
        async with starting:
            said = await asyncio.to_thread(stack.docker, "run", *options, IMAGE, "/waiting")
        return (container := said.strip()), await child_of(stack.pid(container), "waiting")

    return dict(await asyncio.gather(*(start() for _ in range(STORM))))


async def kill(stack: Stack, *services: str) -> None:
    """Kill a container of each service, and wait until the engine has started all again."""
    running = {(one := stack.containers(name)[0]): stack.pid(one) for name in services}
    for pid in running.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for container, killed in running.items():
        await until(lambda c=container, k=killed: stack.pid(c) not in (0, k), WITHIN, every=0.5)  # type: ignore[misc]


async def test_storm_of_containers_with_each_service_killed_in_its_middle_loses_nothing(
    stack: Stack, bus: Bus
) -> None:
    """Every crash is delivered whole, or says what is missing."""
    storm = await waiting_containers(stack)

    for pid in storm.values():
        os.kill(pid, signal.SIGSEGV)
    await kill(stack, "recorder")
    await kill(stack, "collector", "shipper", "nats", "detector", "guard")

    for container in storm:
        manifest, receipts = await delivered(stack, bus, container)
        # What it had read of small processes and not written yet the recorder took with it.
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
