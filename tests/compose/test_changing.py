"""A running stack is changed: TLS, services that are gone for good, other hosts."""

import asyncio
import os
import signal
import ssl
from collections.abc import AsyncIterator
from urllib.request import urlopen

import pytest
import pytest_asyncio

from crashbus import Bus, connect
from tests.compose.delivery import WHOLE, delivered
from tests.compose.readme import Walk
from tests.compose.stack import AGENT_ADDRESS, Stack
from tests.support import core_pattern
from tests.support.docker import IMAGE, child_of
from tests.support.former import Former

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


async def test_agent_takes_over_from_a_killed_recorder_and_guard_and_puts_core_pattern_back(
    walked: Walk, stack: Stack, secured: Bus, former: Former
) -> None:
    """The agent's compose file, as on another host, where the last start ended in the worst way."""
    for service in ("recorder", "guard"):
        kill(stack, stack.containers(service))
    capturing = ("detector", "recorder", "guard", "collector")
    await asyncio.to_thread(stack.compose, "rm", "--force", "--stop", *capturing)
    assert "corepipe" in core_pattern.current()  # nobody was there to put it back

    with stack.agent_running():
        run = ("--detach", "--rm", "--init", IMAGE, "/waiting")
        container = await asyncio.to_thread(stack.engine.run, *run)
        process = await child_of(stack.pid(container), "waiting")
        former.wait_for(process)
        os.kill(process, signal.SIGSEGV)
        manifest, _ = await delivered(stack, secured, container)
        assert {file.kind for file in manifest.files} >= WHOLE
        for port in (9601, 9602, 9603):
            with urlopen(f"http://{AGENT_ADDRESS}:{port}/metrics", timeout=30) as answer:
                assert b"\ncrashbus_healthy 1.0\n" in answer.read()
        # Whoever had core_pattern before goes on getting cores, because that was asked for.
        await former.kept(process)
        # A recorder that was killed does not put it back, and down has to.
        kill(stack, stack.agent("ps", "--quiet", "recorder").split())

    assert core_pattern.current() == walked.core_pattern
    assert not list((stack.directory / "state").rglob("corepipe"))


def kill(stack: Stack, containers: list[str]) -> None:
    """Kill containers for good: the engine does not start them again."""
    stack.docker("kill", "--signal", "KILL", *containers)
