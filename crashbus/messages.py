"""Every message on the bus, as a frozen typed class that is validated once, on arrival.

``docs/wire-contract.md`` is the prose to this module; its tables are made from it.

Versions: ``v`` is ``<major>.<minor>``. A newer minor version only adds fields, which an older
reader skips; another major version is rejected as malformed.
"""

import hashlib
import math
import time as clock
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

import msgpack
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from crashbus import layout, names
from crashbus.errors import MalformedMessage
from crashbus.layout import Kind

VERSION = "1.0"
# Linux cuts a path at 4096 bytes, and a byte that is no UTF-8 takes four characters.
MAX_PATH = 32 * 1024  # characters
MAX_LABELS = 64  # told of one container
MAX_MODULES = 256  # told of one crash
_REASON = r"^[a-z][a-z0-9_]{0,63}$"
_LARGE = "large"  # last token of a work item that shippers have hands of their own for


def _file_name(value: str) -> str:
    if not names.is_file_name(value):
        raise ValueError("not a safe file name")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value) or not 0 <= value < 253402300800:
        raise ValueError("not a time between 1970 and 9999")
    return value


CrashId = Annotated[str, StringConstraints(pattern=r"^[0-9a-hjkmnp-tv-z]{16}$")]
FileName = Annotated[str, StringConstraints(max_length=255), AfterValidator(_file_name)]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
BuildId = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){2,64}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Host = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Time = Annotated[float, AfterValidator(_finite), Field(description="Unix time in seconds")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Size = Annotated[int, Field(ge=0, lt=2**63, description="bytes")]
Pid = Annotated[int, Field(ge=0, lt=2**31)]
UserId = Annotated[int, Field(ge=0, lt=2**32)]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Word = Annotated[int, Field(ge=0, lt=2**64, description="as the 64-bit machine has it")]
Path = Annotated[str, StringConstraints(max_length=MAX_PATH)]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
Encoding = Literal["zstd", "identity"]


class Part(BaseModel):
    """Base of what messages are made of: frozen, and deaf to fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Container(Part):
    """The container a process ran in, as far as its cgroup tells."""

    id: str = Field(description="container ID as the runtime gave it")
    runtime: str = Field(description="docker, containerd, crio, podman, lxc or unknown")
    name: str | None = Field(None, description="the container's name, where the runtime was asked")
    image: str | None = Field(None, description="the image's name, where the runtime was asked")
    labels: dict[str, str] = Field(
        default_factory=dict,
        max_length=MAX_LABELS,
        description="its labels, such as io.kubernetes.pod.name, where the runtime was asked",
    )


class Process(Part):
    """The process that crashed. Text that was not UTF-8 shows its bad bytes as ``\\xNN``."""

    boot_id: str = Field(description="/proc/sys/kernel/random/boot_id of its host")
    pid: Pid = Field(description="process (thread group) ID in the initial PID namespace")
    ns_pid: Pid = Field(description="process ID in its own PID namespace")
    start_ticks: Count = Field(
        description="start in clock ticks since boot, /proc/PID/stat field 22"
    )
    uid: UserId = Field(description="real user ID in the initial user namespace")
    gid: UserId = Field(description="real group ID in the initial user namespace")
    comm: str = Field(max_length=256, description="command name, up to 15 bytes")
    executable: Path | None = Field(None, description="path of the executable, if it was readable")
    command_line: tuple[str, ...] = Field((), description="arguments, possibly cut short")
    cgroup: Path | None = Field(None, description="cgroup path")
    container: Container | None = None


class Sender(Part):
    """The process that sent a signal, as the receiver's namespaces show it."""

    # Whoever sends with rt_sigqueueinfo(2) may forge both, so any 32 bits can stand here.
    pid: int = Field(ge=0, lt=2**32, description="0: it is outside the receiver's PID namespace")
    uid: UserId


class Handler(Part):
    """The function that a process had installed for a signal."""

    address: Word
    flags: Word = Field(description="sa_flags, see sigaction(2)")
    appscope: bool = Field(description="the address lies in AppScope's library")


class Oom(Part):
    """What the kernel knew of the victim of an OOM kill, in KiB where it says so (>= 6.9)."""

    total_vm_kib: Int64 | None = None
    anon_rss_kib: Int64 | None = None
    file_rss_kib: Int64 | None = None
    shmem_rss_kib: Int64 | None = None
    oom_score_adj: Int64 | None = None


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


class CrashFile(Part):
    """One crash file as it was gathered."""

    name: FileName = Field(description="AppScope's name, such as core_1795388839")
    kind: Kind
    size: Size
    sha256: Sha256 = Field(description="of the file's own bytes, before any compression")
    encoding: Encoding = Field(description="zstd: the stored object is <name>.zst")
    stored_size: Size = Field(description="bytes of all chunks together")
    chunks: Count = Field(description="how many; 0 for an empty file")
    truncated: bool = Field(False, description="cut short; see note")
    expected_size: Size | None = Field(
        None, description="of a truncated file: bytes that it would have whole, where it is known"
    )
    note: str | None = Field(None, description="why it was cut short, or what else is odd")
    stored_as: FileName | None = Field(
        None, description="in a receipt: the object's name, where it is not the usual one"
    )

    @property
    def stored_name(self) -> str:
        """The object's name below its folder."""
        if self.stored_as:
            return self.stored_as
        name = self.kind.value if self.kind in layout.SHARED else self.name
        return f"{name}.zst" if self.encoding == "zstd" else name

    @property
    def beside_another(self) -> Self:
        """The same file, under the name that it gets where another content of the same build
        has the usual one.
        """
        return self.model_copy(update={"stored_as": f"{self.kind}-{self.sha256[:16]}"})


class Binary(Part):
    """A file that is kept of a module: the file itself, or its separate debug information."""

    kind: Kind
    size: Size
    sha256: Sha256


class Module(Part):
    """A program or library that a crashed process had mapped as code."""

    path: str = Field(max_length=4096, description="as the process saw it")
    build_id: BuildId
    kept: tuple[Binary, ...] = Field((), max_length=2)

    def files(self) -> Iterator[CrashFile]:
        """Give what is kept of it, as crash files."""
        for one in self.kept:
            yield CrashFile(
                name=layout.binary_name(one.kind, self.build_id, one.sha256),
                kind=one.kind,
                size=one.size,
                sha256=one.sha256,
                encoding="identity",
                stored_size=one.size,
                chunks=0,
            )


class _Placed(CrashMessage):
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


class WorkItem(_Placed):
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
        return f"{item}.{_LARGE}" if any(one.kind in layout.LARGE for one in self.files) else item


class Manifest(_Placed):
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
        None, description="the same for crashes of the same bug, on all hosts and builds"
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


class Attempt(Part):
    """One try that failed."""

    time: Time
    error: str


class DeadLetter(Message):
    """Something that was not delivered, and what would mend it. Sources are kept."""

    SUBJECT: ClassVar[str] = "crash.failed.>"

    # JSON has no bytes: there a payload is base64url.
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    crash_id: CrashId | None = Field(None, description="absent where no crash could be named")
    service: str = Field(description="who gave up: detector, recorder, collector or shipper")
    reason: str = Field(pattern=_REASON, description="short, for machines: access_denied, …")
    error: str = Field(description="what happened, in words")
    mend: str = Field(description="what a human can do about it")
    attempts: Count = 0
    history: tuple[Attempt, ...] = ()
    work: WorkItem | None = Field(None, description="the work item that failed, for a replay")
    subject_received: str | None = Field(None, description="subject of a malformed message")
    payload_received: bytes | None = Field(None, description="a malformed message as it came")

    @property
    def subject(self) -> str:
        return f"crash.failed.{names.token(self.host)}.{self.crash_id or 'unknown'}"


class Postponed(CrashMessage):
    """A delivery failed and is tried again later; the latest of a work item replaces the others."""

    SUBJECT: ClassVar[str] = "crash.postponed.>"

    destination: Url
    files: tuple[FileName, ...] = Field(min_length=1, max_length=64)
    reason: str = Field(pattern=_REASON, description="short, for machines: refused, timeout, …")
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

    def answers(self, letter: DeadLetter) -> bool:
        """Tell whether a dead letter was there when this was asked for, and is meant by it."""
        work = letter.work
        return (
            work is not None
            and work.destination == self.destination
            and letter.time <= self.failed_at
            and {file.name for file in work.files} <= set(self.files)
        )

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


def place_token(destination: str) -> str:
    """Return the last token of the subjects of a destination's work items."""
    return hashlib.sha256(destination.encode()).hexdigest()[:16]


def work_item_filter(destination: str, large: bool = False) -> str:
    """Return the subject filter that takes the work items of one destination and no other.

    Args:
        large: those of cores and binaries, or those of all other files.
    """
    subject = f"crash.file.*.*.*.{place_token(destination)}"
    return f"{subject}.{_LARGE}" if large else subject


def chunk_subject(crash_id: str, file: str) -> str:
    """Return the subject that carries one file's chunks."""
    size = "chunk" if layout.is_large(file) else "small"
    return f"crash.{size}.{crash_id}.{names.token(file)}"
