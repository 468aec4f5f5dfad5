"""One of our services as a real process of its own."""

import asyncio
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.nats import free_port
from tests.support.wait import until


class ServiceProcess:
    """Starts, kills and stops a service.

    Args:
        environment: its settings; health and metrics get a free port.
        wrapper: a command that replaces itself by the service.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        environment: Mapping[str, str],
        wrapper: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.http = f"127.0.0.1:{free_port()}"
        self._log = directory / f"{name}.log"
        self._environment = {
            **os.environ,
            f"CRASHBUS_{name.upper()}_HTTP": self.http,
            "CRASHBUS_LOG_LEVEL": "debug",
            **environment,
        }
        self._wrapper = wrapper
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        assert self._process is not None
        return self._process.returncode is not None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._wrapper,
                sys.executable,
                "-m",
                f"services.{self.name}",
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def change(self, **environment: str) -> None:
        """Change settings, for its next start."""
        self._environment |= environment

    async def healthy(self, within: float = 60) -> None:
        await until(lambda: asyncio.to_thread(self._is_healthy), within, every=0.05)

    def _is_healthy(self) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, self.log
        try:
            with urllib.request.urlopen(f"http://{self.http}/healthz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def faults(self) -> dict[str, str]:
        """Return what health complains of, by what is checked.

        Raises:
            OSError, HTTPException: it does not answer.
        """
        try:
            with urllib.request.urlopen(f"http://{self.http}/healthz", timeout=5):
                return {}
        except urllib.error.HTTPError as error:
            return dict(json.load(error)["faults"])

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        return sum(self.samples(name).values())

    def samples(self, name: str) -> dict[str, float]:
        """Return a metric's values by their labels, such as ``kind="core",result="whole"``."""
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        found = {}
        for line in lines:
            if line.startswith((f"{name} ", f"{name}{{")):
                labelled, _, value = line.rpartition(" ")
                found[labelled.removeprefix(name).strip("{}")] = float(value)
        return found

    def hanging_threads(self) -> list[int]:
        """Return the IDs of its threads that wait for a disk, proc_pid_stat(5)."""
        return [
            int(task.name)
            for task in Path(f"/proc/{self.pid}/task").iterdir()
            if _state(task) == "D"
        ]

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    async def wait(self, within: float = 60) -> int:
        """Return the exit status."""
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), within)

    async def stop(self) -> None:
        """End it in order if it still runs."""
        if self._process is None or self._process.returncode is not None:
            return
        self.kill(signal.SIGTERM)
        try:
            await self.wait()
        except TimeoutError:
            self.kill()
            await self.wait()


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has just ended
        return ""
