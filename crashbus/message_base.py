"""What all messages have: version, host and time, and their way into bytes and back.

Versions: ``v`` is ``<major>.<minor>``. A newer minor version only adds fields, which an older
reader skips; another major version is rejected as malformed.
"""

import time as clock
from typing import Annotated, ClassVar, Self

import msgpack
from pydantic import Field, StringConstraints, ValidationError

from crashbus import layout
from crashbus.errors import MalformedMessage
from crashbus.fields import CrashId, Host, Time
from crashbus.parts import CrashFile, Part

VERSION = "1.0"


class Message(Part):
    """Base of all messages.

    Class attributes:
        SUBJECT: the wildcard subject that matches every message of the class.
    """

    SUBJECT: ClassVar[str]

    v: Annotated[str, StringConstraints(pattern=r"^1\.\d{1,9}$")] = Field(
        VERSION, description="version of the wire contract"
    )
    host: Host = Field(description="name of the host it is about")
    time: Time = Field(default_factory=clock.time)

    @property
    def subject(self) -> str:
        """The subject this message is published on."""
        raise NotImplementedError

    @property
    def message_id(self) -> str | None:
        """Key by which JetStream drops a second copy within two minutes; None: no dropping."""
        return None

    def encode(self) -> bytes:
        """Return the message as msgpack."""
        packed: bytes = msgpack.packb(self.model_dump(mode="python"))
        return packed

    @classmethod
    def decode(cls, payload: bytes, subject: str = "?") -> Self:
        """Read a message from msgpack.

        Raises:
            MalformedMessage: not msgpack, another major version, or a field that is missing
                or out of its range; the reason names the field.
        """
        try:
            data = msgpack.unpackb(payload)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            reason = f"not msgpack: {error or type(error).__name__}"
            raise MalformedMessage(subject, payload, reason) from None
        if not isinstance(data, dict):
            raise MalformedMessage(subject, payload, "not a map") from None
        for name in ("v", "time"):  # what we fill in for our own messages, others must say
            if name not in data:
                raise MalformedMessage(subject, payload, f"field {name!r}: Field required")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise MalformedMessage(subject, payload, _first_fault(error)) from None


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(step) for step in first["loc"])
    return f"field {place[:200]!r}: {first['msg']}"


class CrashMessage(Message):
    """Base of the messages that are about one crash."""

    crash_id: CrashId = Field(description="names the crash of one process on one boot of a host")


class PlacedMessage(CrashMessage):
    """What is needed to derive a crash's folder at any destination."""

    crashed_at: Time = Field(description="Unix seconds of the crash")
    process_name: str = Field(max_length=256)

    @property
    def folder(self) -> str:
        """The crash's folder below a destination's prefix."""
        return layout.folder(self.host, self.crashed_at, self.process_name, self.crash_id)

    def folder_of(self, file: CrashFile) -> str:
        """The folder of one of its files: what many crashes share does not lie with one."""
        shared = layout.binary_folder(file.name) if file.kind in layout.SHARED else None
        return shared or self.folder
