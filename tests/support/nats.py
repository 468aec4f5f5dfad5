"""A real nats-server of a test's own, on a free port, with its own store."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from nats.aio.client import ServerVersion

from crashbus import Bus, removing
from crashbus.errors import BusUnreachable
from crashbus.keys import SEED, make_keys
from crashbus.message_base import Message
from tests.support.wait import until

M = TypeVar("M", bound=Message)

DEPLOY = Path(__file__).parents[2] / "deploy" / "nats"


_given: set[int] = set()


def free_port() -> int:
    """Return a port that nobody listens on, and none twice: its user may only start later."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


def listens(bus: Bus) -> bool:
    """Tell whether someone has begun to listen to crashes on this connection."""
    return any(one.subject.startswith("crash.") for one in bus._client._subs.values())


async def stored(
    bus: Bus, kind: type[M], count: int = 1, subject: str | None = None, within: float = 60
) -> list[M]:
    """Wait until the bus holds so many messages of a kind, and return all."""

    async def enough() -> list[M]:
        with suppress(BusUnreachable):  # it may just be starting
            found = await bus.stored(kind, subject)
            if len(found) >= count:
                return found
        return []

    return await until(enough, within, every=0.1)


class NatsServer:
    """Starts, kills and restarts one nats-server with JetStream on disk.

    Attributes:
        url: where it listens; the same after a restart.
    """

    def __init__(
        self,
        directory: Path,
        extra: str = "",
        port: int | None = None,
        program: str = "nats-server",
    ) -> None:
        self._program = program
        self.port = port or free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._directory = directory
        self.config = directory / "nats.conf"
        self._arguments: list[str] = []
        self._environment = dict(os.environ)
        self._configure(extra)
        self._process: subprocess.Popen[bytes] | None = None

    def _configure(self, extra: str) -> None:
        self.config.write_text(
            f"listen: 127.0.0.1:{self.port}\n"
            f"jetstream {{\n  store_dir: {self._directory / 'store'}\n}}\n{extra}"
        )

    @property
    def log(self) -> str:
        return (self._directory / "nats.log").read_text()

    def start(self) -> None:
        log = (self._directory / "nats.log").open("ab")
        self._process = subprocess.Popen(
            [self._program, "-c", str(self.config), *self._arguments],
            env=self._environment,
            stdout=log,
            stderr=log,
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
        raise RuntimeError(self.log)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

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

    def reload(self) -> None:
        """Have it read its configuration again."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGHUP)

    def _end(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, number)
            self._process.wait(180)  # it may be writing to a disk that is busy
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


class SecuredNats(NatsServer):
    """The bus as deploy/nats/ secures it: a key for each user, and TLS.

    Attributes:
        monitor: where it tells metrics and states.
    """

    def _configure(self, extra: str) -> None:
        self.forbid_deleting()
        if not self.counts_purges:
            self.permit_deleting()
        self.keys = self._directory / "keys"
        make_keys(self.keys)
        command = [str(DEPLOY / "make-certificates.sh"), str(self.keys)]
        subprocess.run(command, check=True, capture_output=True)
        monitor = free_port()
        self.monitor = f"http://127.0.0.1:{monitor}"
        self._arguments = ["-a", "127.0.0.1", "-p", str(self.port), "-m", str(monitor)]
        self._environment = {**os.environ, "NATS_STORE": str(self._directory / "store")}

    @cached_property
    def counts_purges(self) -> bool:
        """Whether it is one for which nats.conf is whole as it is."""
        said = subprocess.run([self._program, "--version"], capture_output=True, check=True).stdout
        return removing.counts_purges(ServerVersion(said.decode().split()[-1].lstrip("v")))

    def forbid_deleting(self) -> None:
        """Take nats.conf as it comes, whatever the server."""
        shutil.copy(DEPLOY / "nats.conf", self.config)

    def permit_deleting(self) -> None:
        """Do what nats.conf says of a server before 2.9.15."""
        (command,) = (
            line.strip("# ")
            for line in self.config.read_text().splitlines()
            if line.strip().startswith("#   sed ")
        )
        subprocess.run(command, shell=True, check=True, cwd=self._directory)

    def settings(self, user: str) -> dict[str, str]:
        """Return what one of its users sets."""
        return {
            "CRASHBUS_NATS_URL": f"tls://localhost:{self.port}",
            "CRASHBUS_NATS_NKEY_FILE": str(self.keys / user / SEED),
            "CRASHBUS_NATS_CA_FILE": str(self.keys / "ca.pem"),
        }

    def options(self, user: str) -> dict[str, Any]:
        """Return what one of its users gives to `crashbus.connect`."""
        context = ssl.create_default_context(cafile=self.keys / "ca.pem")
        return {
            "url": f"tls://localhost:{self.port}",
            "nkeys_seed": str(self.keys / user / SEED),
            "tls": context,
        }
