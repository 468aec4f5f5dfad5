"""What messages are made of."""

from collections.abc import Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from crashbus import layout
from crashbus.fields import (
    BuildId,
    Count,
    Encoding,
    FileName,
    Int64,
    Path,
    Pid,
    Sha256,
    Size,
    Time,
    UserId,
    Word,
)
from crashbus.layout import Kind

MAX_LABELS = 64  # told of one container
MAX_MODULES = 256  # told of one crash


class Part(BaseModel):
    """Base of what messages are made of: frozen, and deaf to fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Container(Part):
    """The container a process ran in, as far as its cgroup tells."""

    id: str = Field(
        description="container ID as the runtime gave it; in a container in a container, of the "
        "outer one"
    )
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
    def only_if_free(self) -> bool:
        """Whether it must replace nothing: a build's usual name belongs to its first content."""
        return self.kind in layout.SHARED and self.stored_as is None

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


class Supplement(Part):
    """Debug information that a module's own refers to, kept under a build ID of its own."""

    build_id: BuildId
    kept: Binary


class Module(Part):
    """A program or library that a crashed process had mapped as code."""

    path: str = Field(max_length=4096, description="as the process saw it")
    build_id: BuildId
    has_build_id: bool = Field(
        True, description="false: the file has none, the first 40 digits of its SHA-256 stand in"
    )
    kept: tuple[Binary, ...] = Field((), max_length=2)
    supplement: Supplement | None = Field(
        None,
        description="what its debug information refers to, as dwz makes it of what several have "
        "in common",
    )

    def files(self) -> Iterator[CrashFile]:
        """Give what is kept of it, as crash files."""
        for _, file in self.files_by_build():
            yield file

    def files_by_build(self) -> Iterator[tuple[str, CrashFile]]:
        """Give them, each behind its build ID."""
        kept = [(self.build_id, one) for one in self.kept]
        if self.supplement is not None:
            kept.append((self.supplement.build_id, self.supplement.kept))
        for build_id, one in kept:
            yield (
                build_id,
                CrashFile(
                    name=layout.binary_name(one.kind, build_id, one.sha256),
                    kind=one.kind,
                    size=one.size,
                    sha256=one.sha256,
                    encoding="identity",
                    stored_size=one.size,
                    chunks=0,
                ),
            )


class Attempt(Part):
    """One try that failed."""

    time: Time
    error: str
