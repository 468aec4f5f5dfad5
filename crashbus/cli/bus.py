"""The bus, as the command line uses it: connect with the settings, read what is stored."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
from crashbus.cli.crashes import Crash, choose, join
from crashbus.cli.errors import Trouble
from crashbus.connecting import without_secrets
from crashbus.errors import BusUnreachable, NoStreams
from services.common.bus_settings import BusSettings

M = TypeVar("M", bound=Message)

NO_STREAMS = Trouble("the bus has no Crashbus streams", "start a collector on it, it makes them")

_CLOCKS = 3600.0  # seconds that the clock of a host may be ahead of the bus's
_WHOLE_ID = re.compile(r"[0-9a-hjkmnp-tv-z]{16}")

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


def stored_crashes(host: str | None = None, since: float | None = None) -> list[Crash]:
    """Return the crashes the bus still knows of, newest first.

    Args:
        host: only of this host.
        since: only from this Unix time on.
    """
    return asyncio.run(_stored_crashes(host, since))


async def _stored_crashes(host: str | None, since: float | None) -> list[Crash]:
    async with connected() as bus:
        if since is None:
            return await read_crashes(bus, host)
        crashes = [
            # What came of an older crash lately tells its own time alone.
            crash if crash.manifest or crash.events else await _read_whole(bus, crash)
            for crash in await read_crashes(bus, host, since - _CLOCKS)
        ]
    return [crash for crash in crashes if crash.time >= since]


async def _read_whole(bus: Bus, crash: Crash) -> Crash:
    return await _read_one(bus, crash.crash_id, crash.host) or crash


async def read_crashes(bus: Bus, host: str | None, since: float | None = None) -> list[Crash]:
    """Return all crashes a bus still knows of, newest first.

    Args:
        since: leave out what the bus stored before this Unix time.
    """

    def of(kind: type[Message]) -> str:
        place = kind.SUBJECT.removesuffix(">")
        return f"{place}{names.token(host)}.>" if host else f"{place}>"

    events, told = await asyncio.gather(
        bus.stored(SignalEvent, of(SignalEvent), since), _read(bus, of, since)
    )
    return told.crashes(events)


def stored_crash(given: str, *, with_events: bool = False) -> Crash:
    """Return the crash that an ID, or its beginning, means.

    Args:
        with_events: and the signals that it took.

    Raises:
        Trouble: no such crash, more than one, or the bus cannot be read.
    """
    return asyncio.run(_stored_crash(given, with_events))


async def _stored_crash(given: str, with_events: bool) -> Crash:
    async with connected() as bus:
        (crash,) = await read_named(bus, [given], None)
        if with_events and not crash.events:
            of_host = SignalEvent.SUBJECT.replace(">", f"{names.token(crash.host)}.>")
            events = await bus.stored(SignalEvent, of_host)
            crash.events = [event for event in events if event.crash_id == crash.crash_id]
    return crash


async def read_named(bus: Bus, given: list[str], host: str | None) -> list[Crash]:
    """Return the crash that each ID, or its beginning, means, each once; whole IDs without a look
    at other crashes, and without events.

    Raises:
        Trouble: no such crash, or more than one.
    """
    found = [await _read_one(bus, one.strip().lower(), host) for one in given]
    if None in found:
        all_crashes = {crash.crash_id: crash for crash in await read_crashes(bus, host)}
        found = [all_crashes[choose(all_crashes, one, "on the bus")] for one in given]
    return [*{crash.crash_id: crash for crash in found if crash}.values()]


async def _read_one(bus: Bus, crash_id: str, host: str | None) -> Crash | None:
    """Return the crash of a whole ID; None if there is none, or only signals tell of it, whose
    subjects name no crash.
    """
    if not _WHOLE_ID.fullmatch(crash_id):
        return None

    def of(kind: type[Message]) -> str:
        place = f"{names.token(host) if host else '*'}.{crash_id}"
        return kind.SUBJECT.replace(">", f"{place}.>" if kind is Postponed else place)

    found = (await _read(bus, of)).crashes([])
    return found[0] if found else None


@dataclass(frozen=True)
class _Told:
    """What the bus tells of crashes, but for signals."""

    manifests: list[Manifest]
    receipts: list[Receipt]
    failures: list[DeadLetter]
    replays: list[Replay]
    postponed: list[Postponed]

    def crashes(self, events: list[SignalEvent]) -> list[Crash]:
        others = (self.receipts, self.failures, self.replays, self.postponed)
        return join(self.manifests, events, *others)


async def _read(bus: Bus, of: Callable[[type[Message]], str], since: float | None = None) -> _Told:
    return _Told(
        *await asyncio.gather(
            bus.stored(Manifest, of(Manifest), since),
            bus.stored(Receipt, of(Receipt), since),
            bus.stored(DeadLetter, of(DeadLetter), since),
            _stored_lately(bus, Replay, of(Replay), since),
            _stored_lately(bus, Postponed, of(Postponed), since),
        )
    )


async def _stored_lately(bus: Bus, kind: type[M], subject: str, since: float | None) -> list[M]:
    """Return messages of a kind that the services of an older version make no stream for."""
    try:
        return await bus.stored(kind, subject, since)
    except NoStreams:
        return []
