"""Settings of the detector."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from crashbus import signals
from services.common.settings import Settings, prefix_of

# Of these, no process dies by default, or (SIGKILL) every thread takes one at any exit.
_NOT_CRASHES = frozenset(
    {"SIGKILL", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGCONT", "SIGCHLD", "SIGURG"}
    | {"SIGWINCH"}
)


class DetectorSettings(Settings):
    """Sees crash signals and OOM kills in the kernel and publishes them."""

    SECTION: ClassVar[str] = "detector"
    model_config = SettingsConfigDict(env_prefix=prefix_of(SECTION))

    signals: Annotated[tuple[str, ...], NoDecode] = Field(
        signals.CRASH_SIGNALS,
        description="signals to watch, separated by commas; SIGINT or SIGTERM may be added",
    )
    handled_quiet: float = Field(
        60,
        ge=0.1,
        le=86400,
        description="seconds without a signal that a process handles, after which its next one "
        "is an event again; until then they are counted",
    )
    ring_pages: int = Field(
        1024,
        description="size of the kernel's ring buffer in pages of 4 KiB, a power of two; an "
        "event takes about 300 bytes",
    )
    outbox_messages: int = Field(
        200_000, ge=1, description="messages that may wait on disk for the bus"
    )
    outbox_bytes: int = Field(
        256 * 1024**2, ge=64 * 1024, description="bytes that may wait on disk for the bus"
    )
    http: str = Field("127.0.0.1:9601", description="host:port to serve health and metrics on")

    @field_validator("signals", mode="before")
    @classmethod
    def _signal_names(cls, given: Any) -> tuple[str, ...]:
        """Read names with or without SIG, or numbers."""
        listed = given.split(",") if isinstance(given, str) else given
        found = [signals.name(signals.number(str(one))) for one in listed if str(one).strip()]
        if wrong := sorted(set(found) & _NOT_CRASHES):
            raise ValueError(f"no process dies of {', '.join(wrong)} as of a crash")
        if not found:
            raise ValueError("at least one signal must be watched")
        return tuple(dict.fromkeys(found))

    @field_validator("ring_pages")
    @classmethod
    def _power_of_two(cls, given: int) -> int:
        if not 1 <= given <= 1 << 18 or given & (given - 1):
            raise ValueError("not a power of two from 1 to 262144")
        return given

    @property
    def signal_numbers(self) -> frozenset[int]:
        """The watched signals as numbers."""
        return frozenset(signals.number(one) for one in self.signals)
