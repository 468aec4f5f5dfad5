"""The errors a user of this package can meet, each a named type that says what failed."""

from crashbus import names


class CrashbusError(Exception):
    """Base of all errors raised by Crashbus itself."""


class MalformedMessage(CrashbusError):
    """A message on the bus does not keep the wire contract.

    Attributes:
        subject: where it was found.
        payload: its bytes as received.
        reason: what is wrong, in one line.
    """

    def __init__(self, subject: str, payload: bytes, reason: str) -> None:
        super().__init__(f"malformed message on {names.printable(subject)}: {reason}")
        self.subject = subject
        self.payload = payload
        self.reason = reason


class DamagedFile(CrashbusError):
    """The bytes received are not the bytes that were sent."""


class ChunksMissing(DamagedFile):
    """Chunks of a file are not on the bus: not there yet, or delivered and removed."""


class BusUnreachable(CrashbusError):
    """No NATS server answers at the configured address."""


class BusFull(CrashbusError):
    """The bus has no room for a message; it has not been stored."""


class MessageTooLarge(CrashbusError):
    """A message is above the server's limit (max_payload); it will never be stored."""


class NotPermitted(BusUnreachable):
    """The server does not let this user do it; it says so only beside, and answers nothing."""


class NoStreams(BusUnreachable):
    """The server answers, but has no Crashbus streams: no collector ever ran on it."""
