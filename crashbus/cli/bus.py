"""The bus, as the command line uses it: connect with the settings, read what is stored."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from crashbus import (
    Bus,
    DeadLetter,
    Manifest,
    Message,
    Postponed,
    Receipt,
    Replay,
    SignalEvent,
    connect,
    names,
)
from crashbus.cli.crashes import Crash, join
from crashbus.cli.errors import Trouble
from crashbus.connecting import without_secrets
from crashbus.errors import BusUnreachable, NoStreams
from services.common.bus_settings import BusSettings

M = TypeVar("M", bound=Message)

NO_STREAMS = Trouble("the bus has no Crashbus streams", "start a collector on it, it makes them")


MEND_KEYS = (
    "set CRASHBUS_NATS_NKEY_FILE, CRASHBUS_NATS_CREDENTIALS, or CRASHBUS_NATS_USER and "
    "CRASHBUS_NATS_PASSWORD_FILE, to what the server knows"
)


@asynccontextmanager
async def connected() -> AsyncIterator[Bus]:
    """Connect to the bus that the settings name.

    Raises:
        Trouble: it does not answer, or it has no streams.
    """
    settings = BusSettings.load()
    refusals: list[str] = []

    async def note(error: Exception) -> None:
        refusals.append(str(error))

    options = {**settings.connection_options("crashbus-cli"), "error_cb": note}
    try:
        async with connect(settings.nats_url, host=settings.host, **options) as bus:
            yield bus
    except NoStreams:
        raise NO_STREAMS from None
    except BusUnreachable as error:
        # The client tries on whatever the server says, so its word is not in the error; a reset may
        # follow it.
        said = next((refusal for refusal in refusals if "uthorization" in refusal), None)
        if said is not None:
            raise Trouble(
                f"{without_secrets(settings.nats_url)} refuses us: {said}", MEND_KEYS
            ) from error
        raise Trouble(str(error), "start the server, or name another with --nats-url") from error


def stored_crashes(host: str | None = None) -> list[Crash]:
    """Return all crashes the bus still knows of, newest first.

    Args:
        host: only of this host.
    """
    return asyncio.run(_stored_crashes(host))


async def _stored_crashes(host: str | None) -> list[Crash]:
    async with connected() as bus:
        return await read_crashes(bus, host)


async def read_crashes(bus: Bus, host: str | None) -> list[Crash]:
    """Return all crashes a bus still knows of, newest first."""

    def of(kind: type[Message]) -> str:
        place = kind.SUBJECT.removesuffix(">")
        return f"{place}{names.token(host)}.>" if host else f"{place}>"

    return join(
        *await asyncio.gather(
            bus.stored(Manifest, of(Manifest)),
            bus.stored(SignalEvent, of(SignalEvent)),
            bus.stored(Receipt, of(Receipt)),
            bus.stored(DeadLetter, of(DeadLetter)),
            _stored_lately(bus, Replay, of(Replay)),
            _stored_lately(bus, Postponed, of(Postponed)),
        )
    )


async def _stored_lately(bus: Bus, kind: type[M], subject: str) -> list[M]:
    """Return messages of a kind that the services of an older version make no stream for."""
    try:
        return await bus.stored(kind, subject)
    except NoStreams:
        return []
