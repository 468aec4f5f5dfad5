"""Why a delivery did not succeed, and whether another try can."""

from crashbus.errors import CrashbusError
from crashbus.parts import CrashFile


class Failure(CrashbusError):
    """Base of all failures of a delivery.

    Attributes:
        reason: short, for machines; the reason of a dead letter and the label of a counter.
        mend: what a human can do about it.
    """

    def __init__(self, reason: str, error: str, mend: str) -> None:
        super().__init__(error)
        self.reason = reason
        self.mend = mend


class Passing(Failure):
    """It may succeed later, with nothing done about it or after the mend."""


class Final(Failure):
    """It cannot succeed before someone mends it."""


class Unfit(Final):
    """One file cannot be delivered; the destination itself is well.

    Attributes:
        file: the one; the other files of its work item are not concerned.
    """

    def __init__(self, file: CrashFile, reason: str, error: str, mend: str) -> None:
        super().__init__(reason, f"{file.name}: {error}", mend)
        self.file = file


# Passing failures that say nothing of how the destination does.
OF_ONE_ITEM = frozenset({"internal_error", "upload_vanished", "bucket_was_missing", "name_taken"})


def not_configured(destination: str) -> Final:
    """Return the failure of an item for a destination that no settings name."""
    return Final(
        "destination_not_configured",
        f"a work item asks for {destination[:200]!r}, which is none of ours",
        "if it is wanted, add it to CRASHBUS_DESTINATIONS of the shippers, then retry",
    )
