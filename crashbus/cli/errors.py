"""What a command says when it cannot do what was asked."""

from crashbus.errors import CrashbusError


class Trouble(CrashbusError):
    """A command cannot go on, for a reason its user can do something about.

    Args:
        what: what is wrong, and where.
        mend: what would help.
    """

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}; {mend}")
        self.what = what
        self.mend = mend
