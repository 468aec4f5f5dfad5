"""core_pattern is one for the whole machine: one test at a time may change it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.requirements import lacking, need_root

LOCK = Path("/run/lock/crashbus-core-pattern.lock")
_SETTINGS = (Path("/proc/sys/kernel/core_pattern"), Path("/proc/sys/kernel/core_pipe_limit"))


@contextmanager
def core_pattern_kept() -> Iterator[None]:
    """Hold the right to change core_pattern; at the end it is as it was, come what may."""
    need_root()
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {path: path.read_bytes() for path in _SETTINGS}
        try:
            _check_writable(before)
            yield
        finally:
            for path, value in before.items():
                if path.read_bytes() != value:
                    path.write_bytes(value)


def current() -> str:
    """Return core_pattern."""
    return _SETTINGS[0].read_text().rstrip("\n")


def pipe_limit() -> int:
    """Return core_pipe_limit."""
    return int(_SETTINGS[1].read_text())


def set_pattern(value: str) -> None:
    """Set core_pattern, as another handler would."""
    _SETTINGS[0].write_text(value)


def _check_writable(values: dict[Path, bytes]) -> None:
    try:
        for path, value in values.items():
            path.write_bytes(value)
    except OSError as error:
        lacking(f"needs a writable core_pattern: {error}")
