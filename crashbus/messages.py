"""Every message on the bus, as a frozen typed class that is validated once, on arrival.

``docs/wire-contract.md`` is the prose to this module; its tables are made from it.
"""

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from crashbus import layout, names
from crashbus.fields import (
    Count,
    CrashId,
    FileName,
    Fingerprint,
    Int32,
    Pid,
    Positive,
    Reason,
    Time,
    Url,
    Word,
)
from crashbus.message_base import CrashMessage, Message, PlacedMessage
from crashbus.parts import (
    MAX_MODULES,
    Attempt,
    CrashFile,
    Handler,
    Module,
    Oom,
    Process,
    Sender,
)
from crashbus.subjects import LARGE, place_token


class SignalEvent(CrashMessage):
    """A crash signal reached a process, or the OOM killer chose it."""

    SUBJECT: ClassVar[str] = "crash.signal.>"

    event_id: str = Field(min_length=1, max_length=64, description="names this one delivery")
    monotonic_ns: Count = Field(description="CLOCK_MONOTONIC in nanoseconds")
    process: Process
    tid: Pid = Field(description="the thread that took the signal")
    signal: int = Field(ge=1, le=64)
    signal_name: str = Field(description="such as SIGSEGV")
    code: Int32 = Field(description="si_code, see sigaction(2)")
    code_meaning: str = Field(description="si_code in words")
    errno: Int32 = 0
    fault_address: Word | None = Field(None, description="si_addr of a fault")
    sender: Sender | None = Field(None, description="who sent it, if a process did")
    disposition: Literal["default", "handled", "oom_kill"] = Field(
        description="default: the process dies of it; handled: its own handler runs; "
        "oom_kill: the kernel's OOM killer chose the process"
    )
    handler: Handler | None = None
    dumpable: int | None = Field(
        None,
        ge=0,
        le=3,
        description="prctl(2), PR_GET_DUMPABLE: with 0 the kernel dumps no core, whoever asks; "
        "absent where it is not known",
    )
    core_limit: Word | None = Field(None, description="RLIMIT_CORE in bytes, the soft limit")
    oom: Oom | None = None

    @property
    def fatal(self) -> bool:
        """Whether the process dies of this, whatever it has installed."""
        return self.disposition != "handled"

    @property
    def subject(self) -> str:
        return f"crash.signal.{names.token(self.host)}.{names.token(self.signal_name)}"

    @property
    def message_id(self) -> str:
        return self.event_id


class SignalCount(CrashMessage):
    """How many further handled signals one process took in about one second.

    A process that handles signals as its normal work (JVM, Go, V8) is published once for
    each signal; the rest are counted in the kernel and told here.
    """

    SUBJECT: ClassVar[str] = "crash.count.>"

    process: Process
    signal: int = Field(ge=1, le=64)
    signal_name: str
    count: Positive
    period: float = Field(gt=0, allow_inf_nan=False, description="seconds counted over")

    @property
    def subject(self) -> str:
        return f"crash.count.{names.token(self.host)}.{names.token(self.signal_name)}"


class EventsLost(Message):
    """Signal events that no one will see: counted where they were lost."""

    SUBJECT: ClassVar[str] = "crash.lost.>"

    stage: Literal["ring_buffer", "outbox"] = Field(
        description="ring_buffer: the kernel had no room; outbox: the disk buffer was full"
    )
    count: Positive

    @property
    def subject(self) -> str:
        return f"crash.lost.{names.token(self.host)}"


class WorkItem(PlacedMessage):
    """Deliver these files of one crash to one destination; their chunks are on the bus."""

    SUBJECT: ClassVar[str] = "crash.file.>"

    destination: Url = Field(description="one of the URLs the shippers were configured with")
    files: tuple[CrashFile, ...] = Field(min_length=1, max_length=64)

    @property
    def subject(self) -> str:
        # One subject for each item, so that its sender can ask whether it still waits.
        crash = f"{names.token(self.host)}.{self.crash_id}"
        file = names.token(self.files[0].name)
        item = f"crash.file.{crash}.{file}.{place_token(self.destination)}"
        return f"{item}.{LARGE}" if any(one.kind in layout.LARGE for one in self.files) else item


class Manifest(PlacedMessage):
    """A whole crash: what it was, and all its files. A later one replaces an earlier one."""

    SUBJECT: ClassVar[str] = "crash.report.>"

    revision: Positive = Field(1, description="grows by one when further files were found")
    process: Process
    signal: int = Field(ge=0, le=64, description="0: not known")
    signal_name: str
    code: Int32 | None = None
    code_meaning: str | None = None
    fault_address: Word | None = None
    fingerprint: Fingerprint | None = Field(
        None,
        description="the same for crashes of a program by one signal in the same functions, on all "
        "hosts and builds that tell these functions alike",
    )
    build_fingerprint: Fingerprint | None = Field(
        None,
        description="the same for crashes at the same place of the same build of a program, "
        "whether symbols were at hand or not",
    )
    files: tuple[CrashFile, ...] = Field(max_length=1024)
    modules: tuple[Module, ...] = Field(
        (),
        max_length=MAX_MODULES,
        description="what it had mapped; these files came with this crash or an earlier one",
    )
    destinations: tuple[Url, ...]
    notes: tuple[str, ...] = Field((), description="what is missing or odd, in words")

    @property
    def subject(self) -> str:
        return f"crash.report.{names.token(self.host)}.{self.crash_id}"


class Receipt(CrashMessage):
    """One file lies verified at one destination."""

    SUBJECT: ClassVar[str] = "crash.shipped.>"

    file: CrashFile
    destination: Url
    url: Url = Field(description="where the object lies")
    attempts: Positive
    shipper: str = Field(description="which shipper delivered it")

    @property
    def subject(self) -> str:
        return f"crash.shipped.{names.token(self.host)}.{self.crash_id}"


class DeadLetter(Message):
    """Something that was not delivered, and what would mend it. Sources are kept."""

    SUBJECT: ClassVar[str] = "crash.failed.>"

    # JSON has no bytes: there a payload is base64url.
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    crash_id: CrashId | None = Field(None, description="absent where no crash could be named")
    service: str = Field(description="who gave up: detector, recorder, collector or shipper")
    reason: Reason = Field(description="short, for machines: see Reasons")
    error: str = Field(description="what happened, in words")
    mend: str = Field(description="what a human can do about it")
    attempts: Count = 0
    history: tuple[Attempt, ...] = ()
    work: WorkItem | None = Field(None, description="the work item that failed, for a replay")
    destinations: tuple[Url, ...] = Field(
        (), max_length=1024, description="where there is no work item: who waits for `files`"
    )
    files: tuple[FileName, ...] = Field(
        (), max_length=64, description="where there is no work item: what a replay can bring"
    )
    subject_received: str | None = Field(None, description="subject of a malformed message")
    payload_received: bytes | None = Field(None, description="a malformed message as it came")

    def given_up(self) -> set[tuple[str, str]]:
        """Return destination and name of each file that a replay can bring."""
        if self.work is not None:
            return {(self.work.destination, file.name) for file in self.work.files}
        return {(place, name) for place in self.destinations for name in self.files}

    @property
    def subject(self) -> str:
        return f"crash.failed.{names.token(self.host)}.{self.crash_id or 'unknown'}"


class Postponed(CrashMessage):
    """A delivery failed and is tried again later; the latest of a work item replaces the others."""

    SUBJECT: ClassVar[str] = "crash.postponed.>"

    destination: Url
    files: tuple[FileName, ...] = Field(min_length=1, max_length=64)
    reason: Reason = Field(description="short, for machines: see Reasons")
    error: str = Field(description="what happened, in words")
    mend: str = Field(description="what a human can do about it")
    attempts: Count = Field(description="tries so far, at least")
    next_try: Time = Field(description="Unix seconds before which it is not tried again")
    given_up: Time = Field(description="Unix seconds after which it becomes a dead letter")

    @property
    def subject(self) -> str:
        crash = f"{names.token(self.host)}.{self.crash_id}"
        file = names.token(self.files[0])
        return f"crash.postponed.{crash}.{file}.{place_token(self.destination)}"


class Replay(CrashMessage):
    """Deliver again what became a dead letter; for the collector of the crash's host."""

    SUBJECT: ClassVar[str] = "crash.retry.>"

    destination: Url
    files: tuple[FileName, ...] = Field(min_length=1, max_length=64)
    failed_at: Time = Field(description="time of the latest dead letter that this answers")

    @property
    def subject(self) -> str:
        return f"crash.retry.{names.token(self.host)}.{self.crash_id}"


ALL: tuple[type[Message], ...] = (
    SignalEvent,
    SignalCount,
    EventsLost,
    WorkItem,
    Manifest,
    Receipt,
    DeadLetter,
    Postponed,
    Replay,
)


def json_schema(kind: type[Message]) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of one message; its msgpack form has the same shape."""
    schema = kind.model_json_schema(mode="serialization")
    # They have defaults for whoever makes a message, but none on the wire.
    schema["required"] = sorted({*schema.get("required", ()), "v", "host", "time"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
