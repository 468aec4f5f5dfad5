"""Our own processes hold the keys of bus and destinations, so their cores are nobody's to keep."""

import ctypes
import resource

# By these recorder and pipe helper know them, wherever they run and however they were started.
NAMES = ("crashbus", "cb-detector", "cb-recorder", "cb-collector", "cb-shipper")
_PR_SET_NAME = 15


def leave_none(name: str) -> None:
    """Name this process as one of ours, and set RLIMIT_CORE to 0 for whoever else has core_pattern.

    Args:
        name: one of `NAMES`; ps(1) shows it.

    To be called from the first thread, which names the process. The name ends with execve(2),
    unlike the limit: what is started from here is not ours by that.
    """
    assert name in NAMES, name
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # there is none but on Linux, and no recorder
        prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
