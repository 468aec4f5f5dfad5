"""The bus's certificate, which is renewed while we are connected."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress

import structlog

from crashbus.bus import Bus
from crashbus.client import RENEW_BEFORE
from crashbus.errors import CrashbusError

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Connect = Callable[[], AbstractAsyncContextManager[Bus]]

LOOK_EVERY = 3600.0  # seconds


async def follow_certificate(bus: Bus, again: Connect) -> None:
    """Connect anew once the server has another certificate in the place of one that ends soon.

    It shows that to those who come. Whoever stays connected would tell of the old one for ever.

    Args:
        again: makes another connection, which trusts whom this one trusts.
    """
    while True:
        await asyncio.sleep(LOOK_EVERY)
        end = bus.certificate_end
        if end is None or end - time.time() > RENEW_BEFORE:
            continue
        with suppress(CrashbusError):  # not now
            async with again() as other:
                is_newer = (other.certificate_end or 0) > end
            if is_newer:
                log.info("the bus has a newer certificate: connecting anew")
                await bus.reconnect()
