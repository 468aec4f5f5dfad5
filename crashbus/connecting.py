"""The way to the bus: found once or told what is in the way, and then kept up for ever."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nats.errors

from crashbus import removing
from crashbus.bus import Bus
from crashbus.client import Client
from crashbus.errors import BusUnreachable, CrashbusError

log = logging.getLogger("crashbus.bus")

CONNECT_TIMEOUT = 2.0  # seconds for one try; a server on the next host answers in milliseconds
RECONNECT_WAIT = 0.5  # seconds between tries: short, so that little piles up meanwhile
MOST_REFUSALS = 100  # told for one connection
_KEYS = ("nkeys_seed", "nkeys_seed_str", "user_credentials")
_MEND_PERMISSIONS = "see its account's permissions"


@asynccontextmanager
async def connect(
    url: str = "nats://127.0.0.1:4222", *, host: str = "consumer", **options: Any
) -> AsyncIterator[Bus]:
    """Connect to the bus.

    Args:
        url: one or more server addresses, separated by commas.
        host: the name that dead letters of this connection carry.
        options: further options of ``nats.connect``, such as ``nkeys_seed``,
            ``user_credentials`` or ``tls``.

    Raises:
        BusUnreachable: no server answers within some seconds, or it refuses us; later losses
            are mended silently.
        CrashbusError: an address or a key cannot be used.
    """
    _check(url, options)
    client, shown = Client(), without_secrets(url)
    watch = _Watch(client, shown)
    settings: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT,
        "reconnect_time_wait": RECONNECT_WAIT,
        "max_reconnect_attempts": -1,
        "disconnected_cb": watch.lost,
        "reconnected_cb": watch.back,
        "error_cb": watch.failed,
        **options,
    }
    try:
        await _first_connection(client, url, settings)
    except (TimeoutError, nats.errors.Error, OSError) as error:
        cause = client.last_error or error  # each try's error is swallowed, the bound's is not
        reason = f"{type(cause).__name__} {cause}".strip()
        raise BusUnreachable(f"no NATS server answers at {shown} ({reason})") from error
    bus = Bus(client, host)
    try:
        yield bus
    finally:
        watch.is_over = True
        await bus.close()


def _check(url: str, options: Mapping[str, Any]) -> None:
    if re.search(r"(?:^|,)\s*wss?://", url, re.IGNORECASE):
        raise CrashbusError(f"{without_secrets(url)}: no WebSockets; give nats:// or tls://")
    if any(options.get(one) for one in _KEYS) and find_spec("nkeys") is None:
        raise CrashbusError("keys need the package nkeys; pip install 'crashbus[nkeys]'")
    if path := options.get("nkeys_seed"):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise CrashbusError(f"cannot read the key {path}: {error.strerror}") from error


class _Watch:
    """Says in the log what becomes of a connection.

    Args:
        shown: the servers' addresses.

    Attributes:
        is_over: it is being closed, so that its loss is no news.
    """

    def __init__(self, client: Client, shown: str) -> None:
        self._client = client
        self._shown = shown
        self._refused: set[str] = set()
        self.is_over = False

    async def lost(self) -> None:
        if not self.is_over:
            log.warning("lost the bus at %s, reconnecting", self._shown)

    async def back(self) -> None:
        log.info("the bus at %s is back", self._shown)

    async def failed(self, error: Exception) -> None:
        """Tell what we are not permitted; what is asked for again and again is told once."""
        text, told = str(error)[:500], self._refused
        if "permissions violation" not in text or text in told or len(told) >= MOST_REFUSALS:
            log.debug("bus: %s", error)
            return
        told.add(text)
        what_to_permit = removing.mend(self._client.connected_server_version, text)
        log.warning("the bus does not let us: %s; %s", text, what_to_permit or _MEND_PERMISSIONS)


def without_secrets(url: str) -> str:
    """Return server addresses as they may be shown: user, password and token left out."""
    return re.sub(r"//[^/,]*@", "//…@", url)


async def _first_connection(client: Client, url: str, settings: dict[str, Any]) -> None:
    """Connect once or fail: without a bound here, the client would try for ever in silence."""
    servers = [part.strip() for part in url.split(",")]
    await asyncio.wait_for(client.connect(servers, **settings), CONNECT_TIMEOUT * len(servers) + 1)
