"""What can go wrong while a crash is recorded, each with what would mend it."""

from crashbus.errors import CrashbusError
from services.common.settings import SettingsError


class RecorderError(SettingsError):
    """The recorder cannot do its work on this host as it is set; the message names the mend."""


class CaptureFailed(CrashbusError):
    """A crash could not be captured at all.

    Attributes:
        reason: one word for machines, as in a dead letter.
        mend: what a human can do about it.
        crash_id: where the crash could be named.
    """

    crash_id: str | None = None

    def __init__(self, reason: str, error: str, mend: str) -> None:
        super().__init__(error)
        self.reason = reason
        self.mend = mend
