"""The crash ID: derived, not drawn, so that every service names the same crash alike.

A process dies once. Boot ID, PID and start time together name one process, so their hash
names its crash, and the detector, the recorder and the collector arrive at the same ID
without asking each other. Where crashes are listed, their time stands before the ID.
"""

import hashlib
from pathlib import Path

# Crockford's alphabet in lower case: no i, l, o, u to be misread.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def crash_id(boot_id: str, pid: int, start_ticks: int) -> str:
    """Return the ID of the crash of one process, 16 characters of [0-9a-hjkmnp-tv-z].

    Args:
        boot_id: /proc/sys/kernel/random/boot_id, as the kernel prints it.
        pid: the process (thread group) ID in the initial PID namespace.
        start_ticks: field 22 of /proc/<pid>/stat, in clock ticks since boot (proc(5)).
    """
    return _name(f"{boot_id.strip().lower()}:{pid}:{start_ticks}")


def unknown_crash_id(boot_id: str, pid: int, epoch: int, uid: int) -> str:
    """Return the ID of the crash of a process that was gone before anyone saw it.

    Its start is not known. What stands in for it is the word of whoever left the files, so
    it must never meet the ID of a process that was seen: it is hashed with a tag of its own.

    Args:
        epoch: Unix seconds in the names of its crash files.
        uid: who owns the files.
    """
    return _name(f"unseen:{boot_id.strip().lower()}:{pid}:{epoch}:{uid}")


def snapshot_id(boot_id: str, pid: int, start_ticks: int, at: float) -> str:
    """Return the ID of a snapshot of a living process, which may crash later, or be taken again.

    Args:
        at: Unix seconds.
    """
    return _name(f"snapshot:{boot_id.strip().lower()}:{pid}:{start_ticks}:{at}")


def _name(what: str) -> str:
    # 80 bits: a collision is not expected below 10^11 crashes.
    digest = hashlib.sha256(what.encode()).digest()
    number = int.from_bytes(digest[:10], "big")
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(75, -1, -5))


def boot_id() -> str:
    """Return the ID of the running boot: 36 characters, a UUID (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int:
    """Return when a living process started, in clock ticks since boot.

    Raises:
        ProcessLookupError: there is no such process any more.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError) as gone:
        raise ProcessLookupError(f"process {pid} is gone") from gone
    return start_ticks_in(stat)


def start_ticks_in(stat: bytes) -> int:
    """Return the start time that a proc_pid_stat(5) tells, field 22, in clock ticks since boot.

    Raises:
        ValueError, IndexError: it is no such text.
    """
    # The command name (field 2) may hold spaces and parentheses: count from its last one.
    return int(stat[stat.rindex(b")") + 2 :].split()[19])
