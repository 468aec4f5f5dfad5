"""A real recorder of a test's own: its own spool, state and socket."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from services.common import capture
from services.common.capture import CaptureRecord
from tests.support.requirements import need_linux
from tests.support.wait import until

START_WITHIN = 60  # seconds; the machine may be busy
FILES = ("info", "cfg", "backtrace", "backtrace_json", "snapshot", "core")


class RecorderService:
    """Runs ``python -m services.recorder``.

    Attributes:
        spool: where its crash files are, in a short directory: a socket's path is bounded.
        log: what it wrote so far.
    """

    def __init__(self, **settings: object) -> None:
        if settings.get("recorder_mechanism") == "socket":
            need_linux((6, 16), "the coredump socket")
        self._directory = Path(tempfile.mkdtemp(prefix="cb-", dir="/tmp"))
        self.spool = self._directory / "spool"
        self.state = self._directory / "state"
        self._log = self._directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.prefix: tuple[str, ...] = ()  # of its command
        self._environment = {
            "CRASHBUS_SPOOL": self.spool,
            "CRASHBUS_STATE": self.state,
            "CRASHBUS_HOST": "test-host",
            "CRASHBUS_NATS_URL": "nats://127.0.0.1:1",
            "CRASHBUS_RECORDER_SOCKET": self.socket,
            "CRASHBUS_RECORDER_HTTP": "",
        } | {f"CRASHBUS_{name.upper()}": value for name, value in settings.items()}

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def socket(self) -> Path:
        """Where crashes arrive."""
        return self._directory / "run" / "s"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def children(self) -> list[int]:
        """Return the PIDs of its workers and watchdogs, and of what those started."""
        return _descendants(self.pid)

    def watchdogs(self) -> list[int]:
        """Return the PIDs of its watchdogs, the less patient one first."""
        found = {}
        for pid in self.children():
            with suppress(OSError):  # a worker ends
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"services.recorder.watchdog" in line:
                    found[pid] = float(line.split(b"\0")[-5])
        return sorted(found, key=found.__getitem__)

    async def start(self) -> None:
        """Start it and wait until crashes go to it."""
        before = self._starts()
        self.launch()
        await until(lambda: self._alive() and self._starts() > before, START_WITHIN)

    def launch(self) -> None:
        """Start it."""
        environment = os.environ | {k: str(v) for k, v in self._environment.items()}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "services.recorder"],
                stderr=log,
                env=environment,
            )

    def _starts(self) -> int:
        # core_pattern alone does not tell: a killed recorder's is still there.
        return self.log.count("recording crashes")

    def _alive(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(self.log)
        return True

    def stop(self) -> int:
        """Stop it with SIGTERM and return its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """End it as the OOM killer would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)

    def kill_with_watchdogs(self) -> None:
        """End it as a container's end does, or a power cut: nobody is left to clean up."""
        os.kill(self.pid, signal.SIGSTOP)  # so that it misses none of them
        for watchdog in self.watchdogs():
            os.kill(watchdog, signal.SIGKILL)
        self.kill()

    def close(self) -> None:
        """Stop it, if it runs, and remove its files."""
        if self.process is not None and self.process.poll() is None:
            self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def record(self, pid: int) -> CaptureRecord | None:
        """Return the newest record of a process that is complete and no longer written."""
        for path in sorted((self.spool / str(pid)).glob("capture_*"), reverse=True):
            with path.open("rb") as file:
                if capture.is_being_written(file.fileno()):
                    continue
                record = capture.read(file.fileno())
                if record.state == "complete":
                    return record
        return None

    async def captured(self, pid: int, within: float = 60) -> CaptureRecord:
        """Wait until a crash is captured whole."""
        try:
            return await until(lambda: self.record(pid), within)
        except TimeoutError:
            raise TimeoutError(f"no record of {pid}; the recorder says:\n{self.log}") from None

    def file(self, pid: int, kind: str) -> Path:
        """Return the only file of a kind that a crash has."""
        pattern = "backtrace_*.json" if kind == "backtrace_json" else f"{kind}_*[0-9]"
        (path,) = (self.spool / str(pid)).glob(pattern)
        return path


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # a thread ends, or all do
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += (child, *_descendants(child))
    return found


def crash(*command: str | Path, within: float = 60, **options: object) -> tuple[int, int]:
    """Run a program until it ends; return its PID and the signal that killed it (0: none)."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **options,  # type: ignore[call-overload]
    )
    return process.pid, -min(0, process.wait(within))
