"""A Docker engine of a test session's own: no network, no registry, its own directories."""

import io
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from tests.support.crashers import SOURCES
from tests.support.requirements import lacking, need_program, need_root
from tests.support.wait import until

START_WITHIN = 60  # seconds
IMAGE = "crashers:test"
PROGRAMS = ("null_pointer", "waiting", "threads", "appscope_like")
RENAMED = {"appscope_like": "libscope.so"}  # the detector knows AppScope's handler by this name


class Engine:
    """``dockerd`` in the background, with one image that holds crashers and nothing else.

    It knows no bridge and no packet filter of the host, so it leaves nothing of either behind;
    containers of one network that is made later reach each other all the same.
    """

    def __init__(self) -> None:
        need_root()
        need_program("dockerd")
        self._directory = Path(tempfile.mkdtemp(prefix="cb-docker-", dir="/tmp"))
        self.socket = self._directory / "s"
        self._log = (self._directory / "log").open("wb")
        self._process = subprocess.Popen(
            [
                "dockerd",
                *("--host", f"unix://{self.socket}"),
                *("--data-root", self._directory / "data"),
                *("--exec-root", self._directory / "run"),
                *("--pidfile", self._directory / "pid"),
                *("--bridge", "none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"),
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self._wait_until_it_answers()
        self._make_image()

    def docker(self, *arguments: str, **options: object) -> "subprocess.CompletedProcess[bytes]":
        """Run the client."""
        command = ["docker", "--host", f"unix://{self.socket}", *arguments]
        return subprocess.run(command, capture_output=True, timeout=60, **options)  # type: ignore[call-overload,no-any-return]

    def run(self, *arguments: str) -> str:
        """Run a container to its end; return its ID."""
        identifier = self._directory / f"id-{time.monotonic_ns()}"
        options = ("--network", "none", "--cidfile", str(identifier))
        done = self.docker("run", *options, *arguments)
        if not identifier.exists() or not identifier.read_text():
            raise RuntimeError(f"docker run {arguments}: {done.stderr.decode()}")
        return identifier.read_text()

    def _wait_until_it_answers(self) -> None:
        end = time.monotonic() + START_WITHIN
        while self.docker("version").returncode:
            if self._process.poll() is not None or time.monotonic() > end:
                log = (self._directory / "log").read_text()[-2000:]
                self.close()
                lacking(f"needs a Docker engine, and dockerd does not start:\n{log}")
            time.sleep(0.1)

    def _make_image(self) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name in PROGRAMS:
                program = self._directory / name
                source = SOURCES / f"{name}.c"
                subprocess.run(
                    ["gcc", "-g", "-O0", "-static", "-pthread", "-o", program, source], check=True
                )
                tar.add(program, arcname=RENAMED.get(name, name))
        done = self.docker("import", "-", IMAGE, input=archive.getvalue())
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        """Stop it with all its containers, and leave nothing."""
        if self._process.poll() is None:
            for one in self.docker("ps", "--quiet", "--all").stdout.split():
                self.docker("rm", "--force", one.decode())
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            place = line.split()[1]
            if place.startswith(str(self._directory)):
                subprocess.run(["umount", "--lazy", place], check=False)
        shutil.rmtree(self._directory, ignore_errors=True)


async def child_of(pid: int, name: str = "") -> int:
    """Return the PID of the one child of a container's init, once it is there.

    The kernel keeps from a container's first process every signal that it has no handler for.

    Args:
        name: of the program that it must have become.
    """
    children = Path(f"/proc/{pid}/task/{pid}/children")
    child = int(await until(lambda: children.read_text().strip()))
    comm = Path(f"/proc/{child}/comm")
    await until(lambda: not name or comm.read_text() == f"{name}\n")
    return child
