"""The bus, as the command line uses it: connect with the settings, read what is stored."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from crashbus import Bus, DeadLetter, Manifest, Receipt, SignalEvent, connect, names
from crashbus.bus import NotStored
from crashbus.cli.crashes import Crash, join
from crashbus.cli.errors import Trouble
from crashbus.errors import BusUnreachable
from services.common.settings import BusSettings

NO_STREAMS = Trouble(
    "the bus has no Crashbus streams", "start a service of Crashbus on it, it makes them"
)


@asynccontextmanager
async def connected() -> AsyncIterator[Bus]:
    """Connect to the bus that the settings name.

    Raises:
        Trouble: it does not answer, or it has no streams.
    """
    settings = BusSettings.load()
    options = settings.connection_options("crashbus-cli")
    try:
        async with connect(settings.nats_url, host=settings.host, **options) as bus:
            yield bus
    except BusUnreachable as error:
        raise Trouble(str(error), "start the server, or name another with --nats-url") from error
    except NotStored:
        raise NO_STREAMS from None


def stored_crashes(host: str | None = None) -> list[Crash]:
    """Return all crashes the bus still knows of, newest first.

    Args:
        host: only of this host.
    """
    return asyncio.run(_stored_crashes(host))


async def _stored_crashes(host: str | None) -> list[Crash]:
    def of(kind: str) -> str:
        return f"crash.{kind}.{names.token(host)}.>" if host else f"crash.{kind}.>"

    async with connected() as bus:
        manifests, events, receipts, failures = await asyncio.gather(
            bus.stored(Manifest, of("report")),
            bus.stored(SignalEvent, of("signal")),
            bus.stored(Receipt, of("shipped")),
            bus.stored(DeadLetter, of("failed")),
        )
    return join(manifests, events, receipts, failures)
