"""A finding: one thing about this host that a service needs, there or not."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a check of the host found.

    Attributes:
        name: what was looked at, such as ``core_pattern``.
        ok: whether it is as needed.
        detail: what was found, in words.
        mend: what a human can do about it; empty when nothing has to be done.
    """

    name: str
    ok: bool
    detail: str
    mend: str = ""
