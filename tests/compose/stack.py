"""The shipped compose file, built and started on a Docker engine of a test session's own.

Bases that would come from a registry are replaced by stand-ins: Debian's, made with mmdebstrap,
and images of the programs of others (tests/compose/Dockerfile). All else is what is shipped.
"""

import json
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from minio import Minio

from crashbus.keys import SEED
from tests.support.docker import Engine
from tests.support.nats import free_port
from tests.support.programs import fetch_programs
from tests.support.requirements import lacking, need_program

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
HERE = Path(__file__).parent
CACHE = ROOT / "build"
BASE_IMAGE = "crashbus-test/base"
OTHERS = "crashbus-test/others"
PROMETHEUS = "crashbus-test/prometheus"
BUS_NAME = "bus.example.com"  # by which agents call the bus
CA_FILE = "/etc/ssl/certs/ca-certificates.crt"  # Debian's
BUILD_WITHIN = 600  # seconds
# Docker 23 knows CAP_BPF and CAP_PERFMON by name.
_FIRST_WITH_CAP_BPF = 23


class Stack:
    """Images, containers and what they share with the host.

    Attributes:
        directory: on the host; holds spool, state and all keys.
        overrides: compose files beside those of a host without others.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.overrides: list[Path] = []
        self.directory = Path(tempfile.mkdtemp(prefix="cb-compose-", dir="/tmp"))
        self.spool = self.directory / "spool"
        self.state = self.directory / "state"
        self.keys = self.directory / "keys"
        self._bus_port = free_port()
        self.access_key, self.secret_key = "k" + os.urandom(8).hex(), "s" + os.urandom(16).hex()
        self._write_keys()
        self._environment = os.environ | {
            "DOCKER_HOST": f"unix://{engine.socket}",
            "DOCKER_CONFIG": str(CACHE / "docker"),
            "DOCKER_BUILDKIT": "1",
            "BASE_IMAGE": BASE_IMAGE,
            "CA_FILE": ssl.get_default_verify_paths().cafile
            or "/etc/ssl/certs/ca-certificates.crt",
            "CRASHBUS_RUNTIME_SOCKET": str(engine.socket),
            "CRASHBUS_SPOOL_DIRECTORY": str(self.spool),
            "CRASHBUS_STATE_DIRECTORY": str(self.state),
            "CRASHBUS_KEYS": str(self.keys),
            "CRASHBUS_NATS_LISTEN": f"127.0.0.1:{self._bus_port}",
            "CRASHBUS_DESTINATIONS": "s3://crashes/host,file:///var/crashes",
            "CRASHBUS_S3_ACCESS_KEY_FILE": str(self.directory / "s3_access_key"),
            "CRASHBUS_S3_SECRET_KEY_FILE": str(self.directory / "s3_secret_key"),
        }

    @property
    def bus_url(self) -> str:
        """Where the bus answers on this host, the same after a restart."""
        return f"{'tls' if self.overrides else 'nats'}://localhost:{self._bus_port}"

    def seed(self, user: str) -> Path:
        """Return the file with the key of one of the bus's users."""
        return self.keys / user / SEED

    def store(self) -> Minio:
        """Return a client of the S3 store, which may get another address when it starts again."""
        address = f"{self.address('storage')}:8333"
        return Minio(address, self.access_key, self.secret_key, secure=False, region="us-east-1")

    def _write_keys(self) -> None:
        self.directory.chmod(0o711)
        for name, value in (("s3_access_key", self.access_key), ("s3_secret_key", self.secret_key)):
            path = self.directory / name
            path.write_text(value)
            os.chown(path, 10001, 10001)
            path.chmod(0o400)

    @cached_property
    def _for_this_engine(self) -> list[Path]:
        """What an old engine needs, as the documentation names it."""
        version = self.docker("version", "--format", "{{.Server.Version}}")
        old = int(version.split(".")[0]) < _FIRST_WITH_CAP_BPF
        return [DEPLOY / "compose.sysadmin.yaml"] if old else []

    def compose(self, *arguments: str, within: float = 180) -> str:
        """Run docker compose; return what it prints."""
        files = [DEPLOY / "compose.yaml", *self._for_this_engine, *self.overrides]
        profiles = ("storage", "cli", "walkthrough", "metrics")
        options = (part for profile in profiles for part in ("--profile", profile))
        return self._compose([*files, HERE / "stand-ins.yaml"], *options, *arguments, within=within)

    def agent(self, *arguments: str) -> str:
        """Run docker compose for what another host runs; return what it prints."""
        files = [DEPLOY / "compose.agent.yaml", *self._for_this_engine, HERE / "agent.yaml"]
        return self._compose(files, *arguments)

    def _compose(self, files: list[Path], *arguments: str, within: float = 180) -> str:
        named = (part for file in files for part in ("--file", str(file)))
        return self.docker("compose", *named, *arguments, within=within)

    def switch_tls_on(self) -> None:
        """Do what the head of compose.tls.yaml says, and let other hosts in."""
        self._environment["SEEN_AT"] = "/etc/nats/keys"
        script = DEPLOY / "nats" / "make-certificates.sh"
        self._must(str(script), str(self.keys), "nats", BUS_NAME)
        self.overrides = [DEPLOY / "compose.tls.yaml"]
        self._environment["CRASHBUS_NATS_LISTEN"] = f"0.0.0.0:{self._bus_port}"

    @contextmanager
    def agent_running(self) -> Iterator[None]:
        """Run what captures as a compose project of its own, as on another host."""
        # The host, as a container of no network of the bus reaches it.
        format_ = "{{range .IPAM.Config}}{{.Gateway}} {{end}}"
        gateways = self.docker("network", "inspect", "--format", format_, "crashbus_listeners")
        self._environment["BUS_ADDRESS"] = gateways.split()[0]
        self._environment["CRASHBUS_NATS_URL"] = f"tls://{BUS_NAME}:{self._bus_port}"
        try:
            self.agent("up", "--detach", "--no-build", "--wait", "--wait-timeout", "120")
            yield
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.agent('logs', '--no-color')}") from None
        finally:
            self.agent("down", "--volumes")

    def docker(self, *arguments: str, within: float = 60, **options: object) -> str:
        """Run the client; return what it prints."""
        done = self.run("docker", *arguments, within=within, **options)
        if done.returncode:
            raise RuntimeError(
                f"docker {' '.join(arguments)}: {(done.stderr + done.stdout)[-5000:]}"
            )
        return done.stdout

    def run(
        self, *command: str, within: float = 60, **options: object
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=within,
            env=self._environment,
            **options,
        )

    def build(self) -> None:
        """Make all images."""
        context = self.directory / "others"
        context.mkdir()
        with ThreadPoolExecutor() as pool:  # all of them fetch packages
            base = pool.submit(self._base)
            others = [pool.submit(self._plugins), pool.submit(fetch_programs, context)]
            for one in others:
                one.result()
            self.docker("import", str(base.result()), BASE_IMAGE)
        self._build_others(context)
        shutil.rmtree(context)
        self.compose("build", "--quiet", within=BUILD_WITHIN)

    def _must(self, *command: str) -> None:
        done = self.run(*command, within=BUILD_WITHIN)
        if done.returncode:
            lacking(f"{' '.join(command)}: {done.stderr[-2000:]}")

    def _plugins(self) -> None:
        """Have docker compose, where this machine has none."""
        if self.run("docker", "compose", "version").returncode:
            self._must(str(HERE / "plugins.sh"), str(CACHE / "docker" / "cli-plugins"))

    def _base(self) -> Path:
        """Return Debian as an archive, kept for the next session."""
        need_program("mmdebstrap")
        made = CACHE / "bookworm.tar"
        if not made.exists():
            CACHE.mkdir(exist_ok=True)
            new = made.with_name(f"bookworm-{os.getpid()}.tar")
            # As in Debian's image; what is built is thrown away, so nothing is synced to disk.
            options = ("--variant=minbase", "--dpkgopt=force-unsafe-io")
            self._must("mmdebstrap", *options, "bookworm", str(new))
            new.rename(made)
        return made

    def _build_others(self, context: Path) -> None:
        shutil.copy(need_program("prometheus"), context)
        options = ("--quiet", "--network", "host", "--build-arg", f"BASE_IMAGE={BASE_IMAGE}")
        for tag in (OTHERS, PROMETHEUS):
            self.docker(
                *("build", *options, "--target", tag.partition("/")[2], "--tag", tag),
                *("--file", str(HERE / "Dockerfile"), str(context)),
                within=BUILD_WITHIN,
            )

    def up(self, shippers: int = 3) -> None:
        """Start everything and wait until it is healthy."""
        options = ("--detach", "--no-build", "--wait", "--wait-timeout", "150")
        # Nothing stands in for Grafana; tests/deploy looks at what it is given.
        scale = {"shipper": shippers, "cli": 0, "walkthrough": 0, "grafana": 0}
        sizes = (part for one, n in scale.items() for part in ("--scale", f"{one}={n}"))
        try:
            self.compose("up", *options, *sizes)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.logs()}") from None

    def down(self) -> None:
        """Stop and remove everything, volumes too."""
        self.compose("down", "--volumes")

    def logs(self, *services: str) -> str:
        return self.compose("logs", "--no-color", "--tail", "300", *services)

    def containers(self, service: str) -> list[str]:
        """Return the IDs of a service's containers, running or not."""
        return self.compose("ps", "--all", "--quiet", service).split()

    def inspect(self, container: str) -> dict[str, object]:
        (found,) = json.loads(self.docker("inspect", container))
        return dict(found)

    def fault(self, container: str) -> str:
        """Return what its image's health check complains of; empty: it is healthy."""
        image = self.inspect(container)["Config"]
        assert isinstance(image, dict)
        kind, *check = image["Healthcheck"]["Test"]
        assert kind == "CMD"
        done = self.run("docker", "exec", container, *check)
        return (done.stdout + done.stderr or "it says nothing") if done.returncode else ""

    def command(self, *arguments: str) -> str:
        """Run the crashbus command in a container of its own, as a user would."""
        return self.compose("run", "--rm", "--no-deps", "cli", *arguments)

    def address(self, service: str) -> str:
        """Return the address of a service's first container, as the host reaches it."""
        (container, *_) = self.containers(service)
        shown = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}"
        return self.docker("inspect", "--format", shown, container).split()[0]

    def pid(self, container: str) -> int:
        """Return the PID of a container's first process on the host; 0: it does not run."""
        return int(self.docker("inspect", "--format", "{{.State.Pid}}", container))

    def volume(self) -> dict[str, bytes]:
        """Return the files that lie where file:///var/crashes leads."""
        (shipper, *_) = self.containers("shipper")
        copy = self.directory / "copy"
        self.docker("cp", f"{shipper}:/var/crashes/.", str(copy))
        files = {str(p.relative_to(copy)): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
        shutil.rmtree(copy)
        return files

    def close(self) -> None:
        """Remove what is on the host."""
        shutil.rmtree(self.directory, ignore_errors=True)
