"""A real nats-server of a test's own, on a free port, with its own store."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class NatsServer:
    """Starts, kills and restarts one nats-server with JetStream on disk.

    Attributes:
        url: where it listens; the same after a restart.
    """

    def __init__(self, directory: Path, extra: str = "") -> None:
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._directory = directory
        self._config = directory / "nats.conf"
        self._config.write_text(
            f"listen: 127.0.0.1:{self.port}\n"
            f"jetstream {{\n  store_dir: {directory / 'store'}\n}}\n{extra}"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self._directory / "nats.log").open("ab")
        self._process = subprocess.Popen(
            ["nats-server", "-c", str(self._config)], stdout=log, stderr=log
        )
        for _ in range(500):
            with socket.socket() as probe:
                probe.settimeout(0.1)
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None:
                break
            try:
                self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
        raise RuntimeError((self._directory / "nats.log").read_text())

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Let it hang: it is there and does not answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def lose_store(self) -> None:
        """Remove all it stored, while it does not run."""
        assert self._process is None
        shutil.rmtree(self._directory / "store")

    def _end(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, number)
            self._process.wait(60)
        self._process = None


class NatsCluster:
    """Three servers that keep everything together, and bear the loss of any one.

    Attributes:
        servers: by name.
        url: all of them, for a client.
    """

    def __init__(self, directory: Path) -> None:
        ports = {f"n{number}": free_port() for number in range(3)}
        routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports.values())
        self.servers: dict[str, NatsServer] = {}
        for name, port in ports.items():
            (directory / name).mkdir(parents=True)
            self.servers[name] = NatsServer(
                directory / name,
                f"server_name: {name}\n"
                f"cluster {{\n  name: test\n  listen: 127.0.0.1:{port}\n  routes: [{routes}]\n}}\n",
            )
        self.url = ",".join(server.url for server in self.servers.values())

    def start(self) -> None:
        for server in self.servers.values():
            server.start()

    def stop(self) -> None:
        for server in self.servers.values():
            server.kill()
