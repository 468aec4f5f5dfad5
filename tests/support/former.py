"""A former owner of core_pattern: a handler that keeps what it was given, or misbehaves."""

import json
import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.wait import until

_HANDLER = Path(__file__).with_name("former_handler.py")


class Former:
    """The handler, in a short directory of its own: core_pattern is bounded.

    It does something only for the processes that it waits for.
    """

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))
        self._program = Path(shutil.copy(_HANDLER, self.place / "h"))
        self._program.chmod(0o755)

    def pattern(self, how: str, templates: str = "%P") -> str:
        """Return the core_pattern that names it; the first template must be %P."""
        return f"|{self._program} {how} {templates}"

    def wait_for(self, pid: int) -> None:
        """Have it do something when this process crashes."""
        (self.place / str(pid)).mkdir()

    async def kept(self, pid: int) -> Any:
        """Wait for what it kept of a crash."""
        path = self.place / str(pid) / "kept"
        await until(path.exists)
        return json.loads(path.read_text())

    def core(self, pid: int) -> Path:
        """Return the core that it read."""
        return self.place / str(pid) / "core"

    def processes(self, pid: int | None = None) -> list[int]:
        """Return those that run it, for one crash, or for all."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (place / "cmdline").read_bytes().split(b"\0")
                named = os.fsencode(self._program) in words
                if named and (pid is None or str(pid).encode() in words):
                    found.append(int(place.name))
        return found

    def close(self) -> None:
        """End those that still run, with the pipe helpers that they stopped, and remove it."""
        for process in self.processes():
            with suppress(OSError):
                status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
                parent = int(status.split()[1])
                if Path(f"/proc/{parent}/comm").read_text() == "corepipe\n":
                    os.kill(parent, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(self.place)
