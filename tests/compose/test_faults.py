"""The bus is away: health tells of it."""

import pytest

from tests.compose.delivery import healthy
from tests.compose.stack import Stack
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="package")

WORKING = ("detector", "recorder", "collector", "shipper")


async def test_services_that_need_the_bus_are_unhealthy_while_it_is_gone(stack: Stack) -> None:
    await healthy(stack, *WORKING)
    (nats,) = stack.containers("nats")

    stack.docker("stop", nats)
    try:
        for service in ("detector", "collector", "shipper"):
            for one in stack.containers(service):
                await until(lambda c=one: "bus" in stack.fault(c), every=0.5)  # type: ignore[misc]
        await healthy(stack, "recorder")  # which captures without it
    finally:
        stack.docker("start", nats)
    await healthy(stack, "nats", *WORKING)
