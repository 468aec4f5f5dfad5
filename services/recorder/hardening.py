"""What this process does to itself before it handles what crashed processes left."""

import ctypes
import os

NOBODY = 65534
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def never_dump_core() -> None:
    """Set PR_SET_DUMPABLE to 0, prctl(2): a recorder that dumped to itself would wait for
    itself, and every later crash with it."""
    _prctl(_PR_SET_DUMPABLE, 0)


def no_new_privileges() -> None:
    """Set PR_SET_NO_NEW_PRIVS: no program started from here gains any."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def become_nobody() -> None:
    """Give up root, if we are, and every way to become anything else."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    no_new_privileges()
    never_dump_core()  # a change of user sets it anew, prctl(2)


def leave_network() -> bool:
    """Move to an empty network namespace, unshare(2); False where that is not permitted."""
    return int(_libc.unshare(_CLONE_NEWNET)) == 0


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
