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

    Attributes:
        core: what it kept of its standard input.
    """

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))
        self._program = Path(shutil.copy(_HANDLER, self.place / "h"))
        self._program.chmod(0o755)
        self.core = self.place / "core"

    def pattern(self, how: str, templates: str = "%P") -> str:
        """Return the core_pattern that names it; the first template must be %P."""
        return f"|{self._program} {how} {templates}"

    async def kept(self) -> Any:
        """Wait for what it kept, and take it."""
        path = self.place / "kept"
        await until(path.exists)
        found = json.loads(path.read_text())
        path.unlink()
        return found

    def processes(self) -> list[int]:
        """Return those that run it."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.fsencode(self._program) in (place / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(place.name))
        return found

    def close(self) -> None:
        """End those that still run, and remove it."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.place)
