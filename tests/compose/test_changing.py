"""A running stack is changed: TLS, services that are gone for good, other hosts."""

import asyncio
import ssl
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from crashbus import Bus, connect
from tests.compose.delivery import WHOLE, delivered
from tests.compose.stack import Stack
from tests.support import core_pattern
from tests.support.docker import IMAGE
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="package")


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def secured(stack: Stack) -> AsyncIterator[Bus]:
    """The bus as it is seen from the host when it was started again with TLS."""
    await asyncio.to_thread(stack.switch_tls_on)
    await asyncio.to_thread(stack.up)
    tls = ssl.create_default_context(cafile=stack.keys / "ca.pem")
    seed = str(stack.seed("operator"))
    async with connect(stack.bus_url, nkeys_seed=seed, tls=tls) as connected:
        yield connected


async def crash(stack: Stack, bus: Bus) -> None:
    """Crash a container, and see it delivered whole."""
    container = await asyncio.to_thread(stack.engine.run, "--rm", IMAGE, "/null_pointer")
    manifest, _ = await delivered(stack, bus, container)
    assert {file.kind for file in manifest.files} >= WHOLE


async def test_crash_is_delivered_over_a_bus_with_tls(stack: Stack, secured: Bus) -> None:
    await crash(stack, secured)


async def test_core_pattern_is_put_back_when_the_recorder_is_killed_for_good(
    stack: Stack, secured: Bus
) -> None:
    """A recorder that was killed does not put it back, and down has to."""
    (container,) = stack.containers("recorder")
    assert core_pattern.current().startswith("|")

    stack.docker("kill", "--signal", "KILL", container)  # the engine does not start it again

    await asyncio.to_thread(stack.compose, "stop", "guard")
    await until(lambda: not core_pattern.current().startswith("|"))


async def test_crash_of_another_host_is_delivered(stack: Stack, secured: Bus) -> None:
    """The agent's compose file, beside a stack that captures nothing itself any more."""
    capturing = ("detector", "recorder", "guard", "collector")
    await asyncio.to_thread(stack.compose, "rm", "--force", "--stop", *capturing)

    with stack.agent_running():
        await crash(stack, secured)
