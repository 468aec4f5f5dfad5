"""A process that waits before its program begins."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from crashbus import identity
from tests.support.crashers import crasher


class Victim:
    """A process that is stopped before its program begins, until `go`."""

    def __init__(
        self, program: str | bytes | Path, *arguments: str | bytes, **options: Any
    ) -> None:
        shell = ["sh", "-c", 'kill -STOP $$; exec "$@"', "sh"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, **options}
        self.process = subprocess.Popen([*shell, program, *arguments], **options)
        self.pid = self.process.pid
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)
        self.start_ticks = identity.start_ticks(self.pid)

    def go(self) -> "Victim":
        os.kill(self.pid, signal.SIGCONT)
        return self

    def kill(self, number: int) -> None:
        """Send a signal once the program has said a line."""
        assert self.process.stdout is not None
        self.process.stdout.readline()
        os.kill(self.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def waiting(count: int) -> list["subprocess.Popen[bytes]"]:
    """Start so many programs that do nothing but wait for a signal to die of."""
    program = str(crasher("waiting"))
    processes = [subprocess.Popen([program], stdout=subprocess.PIPE) for _ in range(count)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    return processes
