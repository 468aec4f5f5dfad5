"""The Crashbus contract: what travels on the bus, and how to read it.

An external consumer needs only this package::

    async with crashbus.connect("nats://127.0.0.1:4222") as bus:
        async for event in bus.subscribe(SignalEvent):
            print(event.signal_name, event.process.executable)
"""

from crashbus.bus import Bus
from crashbus.connecting import connect
from crashbus.errors import CrashbusError, MalformedMessage
from crashbus.identity import crash_id
from crashbus.message_base import Message
from crashbus.messages import (
    DeadLetter,
    Manifest,
    Postponed,
    Receipt,
    Replay,
    SignalCount,
    SignalEvent,
    WorkItem,
)

__all__ = [
    "Bus",
    "CrashbusError",
    "DeadLetter",
    "MalformedMessage",
    "Manifest",
    "Message",
    "Postponed",
    "Receipt",
    "Replay",
    "SignalCount",
    "SignalEvent",
    "WorkItem",
    "connect",
    "crash_id",
]
