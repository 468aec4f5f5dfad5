"""The recorder's settings."""

import sys
from pathlib import Path
from typing import ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from crashbus import destination
from services.common import s3_endpoint
from services.common.settings import Settings, prefix_of
from services.recorder.core import core_filter
from services.recorder.core.core_policy import OWN, Rule
from services.recorder.unwinding.debug_sources import S3, Sources


def _helper() -> Path:
    """Return the pipe helper of this installation, or of this clone."""
    installed = Path(sys.prefix) / "lib" / "corepipe"
    return installed if installed.exists() else Path(__file__).parents[2] / "build" / "corepipe"


def _is_server(url: str) -> bool:
    """Tell whether it is what those who ask there take it for."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return bool(parts.hostname) and url == f"{parts.scheme}://{parts.netloc}{parts.path}"


class RecorderSettings(Settings):
    """Makes the crash files of any process: core, backtrace, snapshot, info and cfg."""

    SECTION: ClassVar[str] = "recorder"
    model_config = SettingsConfigDict(env_prefix=prefix_of(SECTION))

    mechanism: Literal["auto", "socket", "pipe"] = Field(
        "auto",
        description="how the kernel hands over cores: its coredump socket (Linux >= 6.16), a "
        "core_pattern pipe helper, or auto: the socket where there is one",
    )
    socket: Path = Field(
        Path("/run/crashbus/coredump.sock"),
        description="socket that cores arrive on, in a directory that only root can enter",
    )
    helper: Path = Field(
        default_factory=_helper,
        description="the compiled pipe helper, copied to the state directory, which also keeps "
        "crashes while a killed recorder is not back; beside it lies taker.so, without which small "
        "processes are held longer (default: lib/corepipe of the virtual environment, in a clone "
        "build/corepipe)",
    )
    core: Literal["full", "stacks"] = Field(
        "full",
        description="what a core holds: all memory that coredump_filter (core(5)) tells, or the "
        "threads' stacks and readable mappings of up to 64 KiB alone, enough for a backtrace",
    )
    coredump_filter: str = Field(
        "",
        description="kinds of memory that cores may have at most, as a hexadecimal mask of "
        "core(5), such as 0x31 for no shared memory; what a process's own coredump_filter leaves "
        "out is not there in any case; small processes are then held longer; empty: the process's "
        "own alone counts",
    )
    core_off: str = Field(
        "",
        description="who leaves no core, only its backtrace, separated by commas: "
        "executable=/usr/bin/vault*, argument=*/vault.py (any on the command line, or one of over "
        "256 KiB), user=postgres, container=ID or its beginning, label=NAME or "
        "label=NAME=VALUE (with CRASHBUS_RECORDER_RUNTIME_SOCKET or _CRI_SOCKET)",
    )
    own_cores: bool = Field(
        False,
        description="whether Crashbus's own services and commands leave cores, too; these hold "
        "the keys of bus and destinations",
    )
    loop_burst: int = Field(
        100,
        ge=0,
        description="crashes of one program within a minute that leave a whole core each; of more, "
        "the stacks are kept; 0: any number",
    )
    loop_one_in: int = Field(
        10,
        ge=1,
        description="of these many crashes over that, one leaves a whole core all the same",
    )
    core_source: Literal["auto", "stream"] = Field(
        "auto",
        description="where a core's memory is read: from the process itself, many times faster, "
        "as far as that is possible; or always from the kernel's stream",
    )
    core_to: Literal["auto", "disk", "bus"] = Field(
        "auto",
        description="where cores go: disk: to the spool, and from there to the bus; bus: straight "
        "to the bus, with no copy on disk, for which the process is held several times longer; "
        "auto: to the bus those that find no room on disk",
    )
    core_to_patience: float = Field(
        30,
        gt=0,
        le=3600,
        description="seconds without progress after which a core that was to go straight to the "
        "bus is kept on disk, as far as there is room, or with bus, its stacks alone",
    )
    max_core_bytes: int = Field(
        64 * 1024**3,
        ge=0,
        lt=2**63,
        description="bytes that a core may have; a larger one is laid out anew with touched "
        "pages alone, stacks first, the largest mappings left out; 0: as large as it is",
    )
    debug_directory: Path = Field(
        Path("/usr/lib/debug"),
        description="directory of separate debug information, as .build-id/<xx>/<rest>.debug, and "
        "of what that refers to, there or below .dwz, readable for everyone",
    )
    debuginfod_urls: str = Field(
        "",
        description="servers of debug information, as DEBUGINFOD_URLS, and buckets that have "
        "build-id/<xx>/<rest>/debuginfo, as shippers leave it there (s3://bucket/prefix), "
        "separated by spaces; what they have is fetched once for each build ID; empty: nobody is "
        "asked",
    )
    s3_endpoint: str = Field(
        "https://s3.amazonaws.com",
        description="the S3 server of such buckets: http(s)://host[:port]",
    )
    s3_region: str = Field("us-east-1", min_length=1, description="region of such buckets")
    s3_access_key: SecretStr | None = Field(
        None,
        description="access key that may read and list them; without one they are read as anybody "
        "may",
    )
    s3_secret_key: SecretStr | None = Field(None, description="secret key")
    debuginfod_deadline: float = Field(
        10,
        gt=0,
        le=3600,
        description="seconds for the debug information of one crash, and at most half of those "
        "for its backtrace",
    )
    debuginfod_cache: Path = Field(
        Path("/var/cache/crashbus/debuginfo"),
        description="directory for what they sent, readable for everyone",
    )
    debuginfod_cache_bytes: int = Field(
        8 * 1024**3, ge=0, description="bytes kept there; what was used longest ago goes first"
    )
    max_binary_bytes: int = Field(
        1024**3,
        ge=0,
        description="bytes of a program or library that is kept with its core, once for each "
        "build ID, so that the core opens anywhere; 0: keep none",
    )
    disk_reserve: float = Field(
        5,
        ge=0,
        le=100,
        description="percent of the spool's disk that cores leave free; they become smaller, as "
        "at their limit, when there is no more room; cores that are written at the same time may "
        "take half of it",
    )
    stall_deadline: float = Field(
        120,
        gt=0,
        le=3600,
        description="seconds without progress, or waiting, until a held process is let go; where a "
        "pipe helper brings crashes, one that waits is kept by the helper after 60 s at most",
    )
    hold_deadline: float = Field(
        300, gt=0, le=86400, description="seconds until a held process is let go in any case"
    )
    chain: bool = Field(
        False,
        description="whether the handler that core_pattern named before the recorder "
        "(systemd-coredump, apport, ABRT) is started for each crash, too, with the core that was "
        "captured; cores then come by the pipe helper",
    )
    chain_deadline: float = Field(
        60,
        ge=1,
        le=3600,
        description="seconds that a process is held for that handler once it is captured; then the "
        "handler is killed",
    )
    watchdog_deadline: float = Field(
        15,
        ge=3,
        le=3600,
        description="seconds for which the recorder may be stopped or stuck until its watchdog "
        "kills it, so that no crashing process waits for it any longer",
    )
    backtrace_deadline: float = Field(
        30, gt=0, le=3600, description="seconds that the backtrace of one crash may take"
    )
    runtime_socket: Path | None = Field(
        None,
        description="socket of Docker's or Podman's API, such as /run/docker.sock: crashes in "
        "containers then tell the container's name, image and labels",
    )
    cri_socket: Path | None = Field(
        None,
        description="the same of Kubernetes's runtime, such as /run/containerd/containerd.sock or "
        "/run/crio/crio.sock: instead of the other, where containers are those of pods; the labels "
        "tell pod and namespace",
    )
    captures: int = Field(
        16,
        ge=1,
        le=256,
        description="how many cores are read at once, of which a quarter is left to small ones, up "
        "to 256 MiB; with 1 these wait for large ones",
    )
    backtraces: int = Field(2, ge=1, le=64, description="how many backtraces are made at once")
    http: str = Field("127.0.0.1:9602", description="host:port to serve health and metrics")

    @property
    def debug_sources(self) -> Sources:
        """Who `debuginfod_urls` says is asked."""
        access, secret = (
            key.get_secret_value() if key else None
            for key in (self.s3_access_key, self.s3_secret_key)
        )
        s3 = S3(self.s3_endpoint, self.s3_region, access, secret)
        return Sources(tuple(self.debuginfod_urls.split()), s3)

    @property
    def debug_directories(self) -> tuple[Path, ...]:
        """Where debug information may lie."""
        return (self.debug_directory, *((self.debuginfod_cache,) if self.debuginfod_urls else ()))

    @field_validator("debuginfod_urls")
    @classmethod
    def _has_urls(cls, given: str) -> str:
        for one in given.split():
            if one.startswith("s3://"):
                try:
                    destination.parse(one)
                except destination.DestinationError as error:
                    raise ValueError(str(error)) from None
            elif not one.startswith(("http://", "https://")):
                raise ValueError(f"{one!r} is no URL of http://, https:// or s3://")
            elif "@" in one:  # behind a / or #, too, which a password may hold
                raise ValueError(
                    "user name and password are told to no server: leave them out; an @ in a path "
                    "is written as %40"
                )
            elif not _is_server(one):
                raise ValueError(f"{one!r} must be http(s)://host[:port][/path]")
        return given

    @field_validator("s3_endpoint")
    @classmethod
    def _is_endpoint(cls, given: str) -> str:
        return s3_endpoint.checked(given)

    @model_validator(mode="after")
    def _can_ask_buckets(self) -> Self:
        """Have the S3 client itself say what it would refuse when a crash wants its symbols."""
        if "s3://" not in self.debuginfod_urls:
            return self
        try:
            self.debug_sources.urls("00" * 20)
        except ImportError:
            raise ValueError(
                "CRASHBUS_RECORDER_DEBUGINFOD_URLS has an s3:// bucket, and the S3 client is not "
                "installed: pip install 'crashbus[recorder]'"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"CRASHBUS_RECORDER_DEBUGINFOD_URLS has an s3:// bucket that cannot be asked: "
                f"{error}; correct CRASHBUS_RECORDER_S3_ENDPOINT, _S3_REGION, _S3_ACCESS_KEY or "
                "_S3_SECRET_KEY"
            ) from None
        if self.s3_secret_key and not self.s3_access_key:
            raise ValueError(
                "CRASHBUS_RECORDER_S3_SECRET_KEY is given without CRASHBUS_RECORDER_S3_ACCESS_KEY"
            )
        return self

    @property
    def coredump_filter_mask(self) -> int | None:
        """What `coredump_filter` says; None: nothing."""
        return int(self.coredump_filter, 16) if self.coredump_filter else None

    @property
    def core_off_rules(self) -> tuple[Rule, ...]:
        """The rules of `core_off`, and those about ourselves."""
        given = tuple(Rule.parse(one) for one in self.core_off.split(",") if one.strip())
        return given if self.own_cores else (*given, *OWN)

    @field_validator("core_to")
    @classmethod
    def _can_send(cls, given: str, info: ValidationInfo) -> str:
        if given == "bus" and info.data.get("core_source") == "stream":
            raise ValueError("bus reads memory from the process: not with CORE_SOURCE=stream")
        return given

    @field_validator("cri_socket")
    @classmethod
    def _is_the_only_one(cls, given: Path | None, info: ValidationInfo) -> Path | None:
        if given is not None and info.data.get("runtime_socket") is not None:
            raise ValueError("one runtime is asked: give this, or RUNTIME_SOCKET")
        return given

    @field_validator("core_source")
    @classmethod
    def _can_leave_out(cls, given: str, info: ValidationInfo) -> str:
        if given == "stream" and info.data.get("coredump_filter"):
            raise ValueError("stream is all or nothing: not with COREDUMP_FILTER")
        return given

    @field_validator("coredump_filter")
    @classmethod
    def _is_mask(cls, given: str) -> str:
        if not given:
            return given
        try:
            mask = int(given, 16)
        except ValueError:
            mask = -1
        if not 0 <= mask <= core_filter.ALL:
            raise ValueError(f"{given!r} is no mask of core(5): a hexadecimal number, 1 to 1ff")
        if not mask & core_filter.ANON_PRIVATE:
            raise ValueError(
                f"{given!r} lacks bit 0: stacks are private memory, and there is no backtrace "
                "without them; CRASHBUS_RECORDER_CORE=stacks keeps little else"
            )
        return given

    @field_validator("core_off")
    @classmethod
    def _has_rules(cls, given: str) -> str:
        for one in given.split(","):
            if one.strip():
                Rule.parse(one)
        return given
