"""Services are killed or cut off: nothing is lost, and health tells of it."""

import asyncio
import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from crashbus import Bus, DeadLetter, Manifest
from crashbus.identity import boot_id, crash_id, start_ticks
from crashbus.layout import Kind
from tests.compose.delivery import WHOLE, WITHIN, healthy, in_bucket
from tests.compose.stack import CAPTURES, CRASHING, Stack
from tests.support.docker import IMAGE, child_of
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="package")

SMALL, LARGE = 14, 6  # containers that crash at once
_MEMORY = 32 << 20  # bytes of a large one
HOLDING = f"import os, signal; kept = os.urandom({_MEMORY}); signal.pause()"
WORKING = ("detector", "recorder", "collector", "shipper")
OTHERS = ("detector", "guard", "collector", "nats", "shipper", "storage")


class Waiting(NamedTuple):
    """A container, and the process in it that is to crash."""

    container: str
    pid: int
    crash_id: str


async def start(stack: Stack) -> list[Waiting]:
    """Start containers that wait."""
    small, large = (IMAGE, "/waiting"), (CRASHING, "python", "-c", HOLDING)
    few = asyncio.Semaphore(4)

    async def run(command: tuple[str, ...]) -> Waiting:
        async with few:
            options = ("--detach", "--rm", "--init")
            container = await asyncio.to_thread(stack.engine.run, *options, *command)
            pid = await child_of(stack.pid(container))
            await until(lambda: is_ready(pid, command))
            return Waiting(container, pid, crash_id(boot_id(), pid, start_ticks(pid)))

    return await asyncio.gather(*map(run, [small] * SMALL + [large] * LARGE))


def is_ready(pid: int, command: tuple[str, ...]) -> bool:
    """Tell whether a process is the program, and has the memory that it is to have."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0])
    return (
        resident >= _MEMORY >> 10 if CRASHING in command else status.startswith("Name:\twaiting\n")
    )


def running(stack: Stack, *services: str) -> dict[str, int]:
    """Return the process of each container of these services."""
    found = {one: stack.pid(one) for service in services for one in stack.containers(service)}
    assert all(found.values()), found  # 0 would be ourselves, kill(2)
    return found


def kill(processes: dict[str, int]) -> None:
    """Kill containers in one moment."""
    for pid in processes.values():
        os.kill(pid, signal.SIGKILL)


async def run_again(stack: Stack, killed: dict[str, int]) -> None:
    """Wait until the engine has started each again, by itself."""
    for one, pid in killed.items():
        await until(lambda c=one, k=pid: stack.pid(c) not in (0, k), WITHIN, every=0.5)  # type: ignore[misc, arg-type]


@pytest.mark.timeout(600)
async def test_storm_with_every_container_killed_in_its_middle_is_delivered_or_told(
    stack: Stack, bus: Bus
) -> None:
    storm = await start(stack)
    await healthy(stack, *WORKING)
    recorder = running(stack, "recorder")

    for one in storm:
        os.kill(one.pid, signal.SIGSEGV)
    await until(lambda: any((stack.spool / str(one.pid)).exists() for one in storm), every=0)
    kill(recorder)
    assert any(Path(f"/proc/{one.pid}").exists() for one in storm)  # it held them
    await run_again(stack, recorder)
    await until(lambda: told(bus, storm))
    others = running(stack, *OTHERS)
    kill(others)
    await run_again(stack, others)

    await healthy(stack, "nats", "storage")
    await until(lambda: bus.is_connected)
    in_hand = [one for one in storm if not await core_is_whole(stack, bus, one)]
    assert len(in_hand) <= CAPTURES


async def told(bus: Bus, storm: list[Waiting]) -> bool:
    """Tell whether any crash of the storm was reported."""
    return any([await report(bus, one) for one in storm])


async def report(bus: Bus, one: Waiting) -> Manifest | None:
    """Return the latest report of a crash."""
    found = [made for made in await bus.stored(Manifest) if made.crash_id == one.crash_id]
    return found[-1] if found else None


async def failures(bus: Bus, one: Waiting) -> list[str]:
    """Return why a crash was not delivered."""
    letters = await bus.stored(DeadLetter)
    return [letter.reason for letter in letters if letter.crash_id == one.crash_id]


async def core_is_whole(stack: Stack, bus: Bus, one: Waiting) -> bool:
    """Tell whether a crash was delivered with its core; if not, or if it lacks what is made after
    that, the recorder that was killed had it in hand, and that is said.
    """
    reported = await until(lambda: report(bus, one), WITHIN, every=0.2)
    if not reported.files:
        reasons = await until(lambda: failures(bus, one), WITHIN, every=0.2)
        assert reasons == ["not_captured"]
        return False
    manifest = await in_bucket(stack, one.crash_id)
    if not {file.kind for file in manifest.files} >= WHOLE:
        assert manifest.notes, manifest
    return any(file.kind is Kind.CORE and not file.truncated for file in manifest.files)


async def test_services_that_need_the_bus_are_unhealthy_while_it_is_gone(stack: Stack) -> None:
    await healthy(stack, *WORKING)
    (nats,) = stack.containers("nats")

    stack.docker("stop", nats)
    try:
        for service in ("detector", "collector", "shipper"):
            for one in stack.containers(service):
                await until(lambda c=one: "bus" in stack.fault(c), every=0.5)  # type: ignore[misc, arg-type]
        await healthy(stack, "recorder")  # which captures without it
    finally:
        stack.docker("start", nats)
    await healthy(stack, "nats", *WORKING)
