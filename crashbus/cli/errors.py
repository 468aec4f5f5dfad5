"""What a command says when it cannot do what was asked."""

from typing import ClassVar

from crashbus.errors import CrashbusError

EXIT_SETTINGS = 2  # of services, too


class Trouble(CrashbusError):
    """A command cannot go on, for a reason its user can do something about.

    Args:
        what: what is wrong, and where.
        mend: what would help.

    Class attributes:
        STATUS: what the command exits with.
    """

    STATUS: ClassVar[int] = 1

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}; {mend}")
        self.what = what
        self.mend = mend


class WrongSetup(Trouble):
    """A setting or the host is not as it must be: to try again does not help."""

    STATUS = EXIT_SETTINGS
