"""NATS's many errors as ours."""

import asyncio
from typing import Any

import nats.errors
import nats.js.errors

from crashbus.cancellation import obeying_cancellation
from crashbus.errors import BusFull, BusUnreachable, MessageTooLarge, NoStreams

_STREAM_NOT_FOUND = 10059
_STORE_FULL = {10023, 10047, 10077}  # resources exceeded, store full, maximum bytes exceeded


class NotStored(nats.js.errors.NotFoundError):
    """The server has no such message."""


class as_bus_errors(obeying_cancellation):  # noqa: N801
    """Context in which NATS's many errors become ours."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, (NotStored, BusUnreachable)):
            return
        if isinstance(error, nats.errors.MaxPayloadError):
            raise MessageTooLarge("above the server's max_payload; raise it") from error
        if isinstance(error, nats.js.errors.NoStreamResponseError):
            raise NoStreams("the bus has no Crashbus streams; a collector makes them") from error
        if isinstance(error, nats.js.errors.NotFoundError):
            if error.err_code == _STREAM_NOT_FOUND:
                raise NoStreams("the bus has no Crashbus streams") from error
            raise NotStored(error.code, error.description, error.err_code) from error
        if isinstance(error, nats.js.errors.APIError) and error.err_code in _STORE_FULL:
            raise BusFull(f"the bus has no room: {error.description}") from error
        if isinstance(error, (nats.errors.Error, OSError, asyncio.TimeoutError)):
            raise BusUnreachable(f"the bus did not answer: {error}") from error
