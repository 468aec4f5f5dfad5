"""A lease on a file, so that whoever opens it waits: fcntl(2), F_SETLEASE."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLDER = (
    "import fcntl, signal, sys; signal.signal(signal.SIGIO, signal.SIG_IGN); "
    "file = open(sys.argv[1], 'r+'); fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK); "
    "print(flush=True); sys.stdin.read()"
)


@contextmanager
def leased(file: Path) -> Iterator[None]:
    """Have another process hold a lease on a file, and not let go of it when asked to."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _HOLDER, file], stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        yield
        holder.communicate()
