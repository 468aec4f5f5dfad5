"""core_pattern as the kernel has it, and the lock without which nobody changes it.

A watchdog loads this and little else: until it has done its work, each crash is lost.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# In a container /proc/sys is read-only; deploy/compose.yaml mounts the two files of it here.
_MOUNTED = Path("/host/proc/sys/kernel")
_KERNEL = _MOUNTED if _MOUNTED.is_dir() else Path("/proc/sys/kernel")
PATTERN = _KERNEL / "core_pattern"
PIPE_LIMIT = _KERNEL / "core_pipe_limit"

# One for the host, whatever state directories there are: two recorders would each put back the
# other's pattern. Containers share its directory with the host.
LOCK = Path("/run/crashbus/recorder.lock")
LOCK_WITHIN = 3.0  # seconds
_LOCK_AGAIN = 0.02  # seconds between two tries


@contextmanager
def locked(within: float = LOCK_WITHIN) -> Iterator[None]:
    """Hold the right to change core_pattern.

    Args:
        within: seconds to wait for it.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be had at all.
    """
    LOCK.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _lock(descriptor, within)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, within: float) -> None:
    """Lock, waiting a moment: a dead recorder's watchdog holds it while it puts back."""
    end = time.monotonic() + within
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(_LOCK_AGAIN)


def beat() -> None:
    """Say, as whoever holds the lock, that we work; the guard looks for it."""
    with suppress(OSError):
        os.utime(LOCK)


def tell_patience(seconds: float) -> None:
    """Say, as whoever holds the lock, that we give signs of life, and how long nobody else may free
    a crashed process once there are none: whoever watches us does not know our settings.

    Raises:
        OSError: it cannot be written.
    """
    LOCK.write_text(f"{seconds:g}\n")


def told_patience() -> float | None:
    """Return what `tell_patience` said last; None: nothing, as a recorder before it."""
    try:
        return float(LOCK.read_text())
    except (OSError, ValueError):
        return None


def last_beat() -> int | None:
    """Return when `beat` was called last, in nanoseconds; only a difference tells something."""
    try:
        return LOCK.stat().st_mtime_ns
    except OSError:
        return None


def in_container() -> bool:
    """Tell whether programs that core_pattern names lie outside of what we see."""
    return _KERNEL == _MOUNTED


def current() -> str:
    """Return the core_pattern in force."""
    return PATTERN.read_bytes().rstrip(b"\n").decode("utf-8", "surrogateescape")


def write(path: Path, value: str) -> None:
    """Set core_pattern or core_pipe_limit."""
    # One write(2): the kernel takes each write as the whole value.
    path.write_bytes(value.encode("utf-8", "surrogateescape"))


def leave_to_helper(ours: str, stand_in: str | None) -> bool:
    """Have the pipe helper keep crashes in the place of a recorder that is gone.

    Args:
        ours: the core_pattern of that recorder; whatever else is in force stays.
        stand_in: the one that names the helper; None where it cannot be had.

    Returns:
        Whether the helper keeps crashes now.
    """
    if stand_in is not None and current() == ours:
        write(PATTERN, stand_in)
    return current() == stand_in
