"""systemd's own handler of cores, as its units run it on a host with systemd.

Debian's package is unpacked by deploy/setup.sh and not installed: that would change core_pattern.
The kernel starts the program with the core; it passes that on to a second one over a socket.
"""

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "build/systemd-coredump/lib/systemd/systemd-coredump"
STORED = Path("/var/lib/systemd/coredump")
_SOCKET = Path("/run/systemd/coredump")
_TEMPLATES = "%P %u %g %s %t 9223372036854775808 %h"


def available() -> bool:
    """Tell whether it can run here, beside no other."""
    return PROGRAM.exists() and not Path("/run/systemd/system").exists()


@contextmanager
def systemd_coredump(place: Path) -> Iterator[str]:
    """Have it ready; yields its core_pattern. What it stores goes at the end.

    Args:
        place: a short directory; core_pattern is bounded.
    """
    program = place / "systemd-coredump"
    program.unlink(missing_ok=True)
    program.symlink_to(PROGRAM)
    STORED.mkdir(parents=True, exist_ok=True)
    before = set(STORED.iterdir())
    _SOCKET.parent.mkdir(parents=True, exist_ok=True)
    _SOCKET.unlink(missing_ok=True)  # of one that was killed
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(_SOCKET))
        listening.listen(8)
        thread = threading.Thread(target=_activate, args=(listening, program), daemon=True)
        thread.start()
        try:
            yield f"|{program} {_TEMPLATES}"
        finally:
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # ends accept(2)
            thread.join(60)
            _SOCKET.unlink()
            for one in set(STORED.iterdir()) - before:
                one.unlink()


def _activate(listening: socket.socket, program: Path) -> None:
    """Start a second one for each connection, as systemd.socket(5) does."""
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return  # it is over
        with connection:
            command = f'exec 3<&{connection.fileno()}; export LISTEN_PID=$$; exec "{program}"'
            subprocess.run(
                ["/bin/bash", "-c", command],
                env={"LISTEN_FDS": "1", "PATH": os.environ["PATH"]},
                pass_fds=[connection.fileno()],
                stderr=subprocess.DEVNULL,
                check=False,
            )
