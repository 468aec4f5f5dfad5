"""The shipped compose file, built and started on a Docker engine of a test session's own.

A copy of what a clone holds is used as the README tells. Images that would come from a registry
are replaced by stand-ins of the same names: Debian's, made with mmdebstrap, and images of the
programs of others (tests/compose/Dockerfile). All else is what is shipped.
"""

import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import yaml
from minio import Minio

from crashbus.keys import SEED
from tests.support.docker import Engine
from tests.support.nats import free_port
from tests.support.programs import fetch_programs
from tests.support.requirements import lacking, need_program

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CACHE = ROOT / "build"
STAND_INS_FILE = HERE / "stand-ins.yaml"
CRASHING = "python:3-slim"  # the image that the README crashes
# At a time, by the recorder.
CAPTURES = int(
    yaml.safe_load(STAND_INS_FILE.read_text())["services"]["recorder"]["environment"][
        "CRASHBUS_RECORDER_CAPTURES"
    ]
)


def pinned(name: str) -> str:
    """Return the image that the Dockerfile names so."""
    (found,) = re.findall(rf"^ARG {name}=(\S+)$", (ROOT / "deploy/Dockerfile").read_text(), re.M)
    return str(found)


def image_of(service: str) -> str:
    """Return the image that the compose file names for a service."""
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    return str(services[service]["image"])


BASE_IMAGE = pinned("BASE_IMAGE")
NGINX = image_of("walkthrough")
# Stage of tests/compose/Dockerfile by the image for which it stands in.
STAND_INS = {
    pinned("NATS_IMAGE"): "others",
    pinned("STORAGE_IMAGE"): "others",
    NGINX: "nginx",
    CRASHING: "python",
    image_of("prometheus"): "prometheus",
    # Nothing stands in for Grafana, and it is not started; tests/deploy looks at what it is given.
    image_of("grafana"): "others",
}
BUS_NAME = "bus.example.com"  # by which agents call the bus
CA_FILE = "/etc/ssl/certs/ca-certificates.crt"  # Debian's
AGENT_ADDRESS = "127.0.0.77"  # of the host, where nothing else listens
BUILD_WITHIN = 1200  # seconds, on a busy machine
# Docker 23 knows CAP_BPF and CAP_PERFMON by name.
_FIRST_WITH_CAP_BPF = 23


class Stack:
    """Images, containers and what they share with the host.

    Attributes:
        directory: on the host; holds all of it.
        clone: what a fresh clone holds, and what is made there.
        overrides: compose files beside those of a host without others.
        ca_file: certificates that a build trusts.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.overrides: list[str] = []
        self.directory = Path(tempfile.mkdtemp(prefix="cb-compose-", dir="/tmp"))
        self.directory.chmod(0o711)
        self.clone = self.directory / "crashbus"
        self.keys = self.clone / "deploy" / "keys"
        self.spool = self.directory / "spool"
        self.ca_file = ssl.get_default_verify_paths().cafile or CA_FILE
        self._bus_port = free_port()
        # What differs from a user's host: the engine, directories of the test's own, a free port.
        self._environment = os.environ | {
            "DOCKER_HOST": f"unix://{engine.socket}",
            "DOCKER_CONFIG": str(CACHE / "docker"),
            "CA_FILE": self.ca_file,
            "CRASHBUS_RUNTIME_SOCKET": str(engine.socket),
            "CRASHBUS_SPOOL_DIRECTORY": str(self.spool),
            "CRASHBUS_STATE_DIRECTORY": str(self.directory / "state"),
            "CRASHBUS_NATS_LISTEN": f"127.0.0.1:{self._bus_port}",
        }

    @property
    def bus_url(self) -> str:
        """Where the bus answers on this host, the same after a restart."""
        return f"{'tls' if self.overrides else 'nats'}://localhost:{self._bus_port}"

    def seed(self, user: str) -> Path:
        """Return the file with the key of one of the bus's users."""
        return self.keys / user / SEED

    def store_keys(self) -> list[str]:
        """Return access key and secret key of the S3 store."""
        secrets = self.clone / "deploy" / "secrets"
        return [(secrets / f"s3_{one}_key").read_text() for one in ("access", "secret")]

    def store(self) -> Minio:
        """Return a client of the S3 store, which may get another address when it starts again."""
        access, secret = self.store_keys()
        address = f"{self.address('storage')}:8333"
        return Minio(address, access, secret, secure=False, region="us-east-1")

    @cached_property
    def _for_this_engine(self) -> list[str]:
        """What an old engine needs, as the documentation names it."""
        version = self.docker("version", "--format", "{{.Server.Version}}")
        return ["compose.sysadmin.yaml"] if int(version.split(".")[0]) < _FIRST_WITH_CAP_BPF else []

    def shell(self, line: str, directory: str = "deploy") -> "subprocess.CompletedProcess[str]":
        """Run a command of the documentation in a directory of the clone."""
        files = ["compose.yaml", *self._for_this_engine, *self.overrides, str(STAND_INS_FILE)]
        return self.run(
            *("env", f"COMPOSE_FILE={':'.join(files)}", "bash", "-c", line),
            within=BUILD_WITHIN,
            cwd=self.clone / directory,
        )

    def must(self, line: str, directory: str = "deploy") -> str:
        """Run a command as `shell` does; return what it prints."""
        done = self.shell(line, directory)
        if done.returncode:
            raise RuntimeError(f"{line}: {(done.stderr + done.stdout)[-5000:]}")
        return done.stdout

    def compose(self, *arguments: str) -> str:
        """Run docker compose, for services of all profiles; return what it prints."""
        profiles = ("storage", "cli", "walkthrough", "metrics")
        options = (part for profile in profiles for part in ("--profile", profile))
        return self.must(shlex.join(["docker", "compose", *options, *arguments]))

    def agent(self, *arguments: str) -> str:
        """Run docker compose for what another host runs; return what it prints."""
        files = ["compose.agent.yaml", *self._for_this_engine, str(HERE / "agent.yaml")]
        named = (part for file in files for part in ("--file", file))
        return self.must(shlex.join(["docker", "compose", *named, *arguments]))

    def switch_tls_on(self) -> None:
        """Do what the head of compose.tls.yaml says, and let other hosts in."""
        self.must(f"SEEN_AT=/etc/nats/keys nats/make-certificates.sh keys nats {BUS_NAME}")
        self.overrides = ["compose.tls.yaml"]
        self._environment["CRASHBUS_NATS_LISTEN"] = f"0.0.0.0:{self._bus_port}"

    @contextmanager
    def agent_running(self) -> Iterator[None]:
        """Run what captures as a compose project of its own, as on another host."""
        # The host, as a container of no network of the bus reaches it.
        format_ = "{{range .IPAM.Config}}{{.Gateway}} {{end}}"
        gateways = self.docker("network", "inspect", "--format", format_, "crashbus_listeners")
        self._environment["BUS_ADDRESS"] = gateways.split()[0]
        self._environment["CRASHBUS_CHAIN"] = "true"
        self._environment["CRASHBUS_METRICS_LISTEN"] = AGENT_ADDRESS
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

    def prepare(self) -> None:
        """Have a clone, and what stands in for images of others."""
        context = self.directory / "others"
        context.mkdir()
        with ThreadPoolExecutor() as pool:  # all of them fetch packages
            base = pool.submit(self._base)
            others = [pool.submit(self._plugins), pool.submit(fetch_programs, context)]
            for one in others:
                one.result()
            self.docker("import", str(base.result()), BASE_IMAGE)
        self._build_stand_ins(context)
        shutil.rmtree(context)
        self._clone()

    def _clone(self) -> None:
        """Copy what git knows of, as it is now."""
        known = self.run("git", "-C", str(ROOT), "ls-files", "-z")
        assert known.returncode == 0, known.stderr
        for name in known.stdout.rstrip("\0").split("\0"):
            (self.clone / name).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # it was removed, and that is not committed yet
                shutil.copy(ROOT / name, self.clone / name)

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

    def _build_stand_ins(self, context: Path) -> None:
        shutil.copy(need_program("prometheus"), context)
        options = ("--quiet", "--network", "host", "--build-arg", f"BASE_IMAGE={BASE_IMAGE}")
        for image, stage in STAND_INS.items():
            self.docker(
                *("build", *options, "--target", stage, "--tag", image),
                *("--file", str(HERE / "Dockerfile"), str(context)),
                within=BUILD_WITHIN,
            )

    def up(self, shippers: int = 3) -> None:
        """Start everything and wait until it is healthy."""
        scale = {"shipper": shippers, "cli": 0, "walkthrough": 0, "grafana": 0}
        sizes = " ".join(f"--scale {one}={n}" for one, n in scale.items())
        try:
            self.compose("up", "--detach", "--no-build", "--wait", *sizes.split())
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.logs()}") from None

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
        """Return the files that lie where file:///var/crashes leads, by their names there."""
        (shipper, *_) = self.containers("shipper")
        copy = self.directory / "copy"
        self.docker("cp", f"{shipper}:/var/crashes/.", str(copy))
        files = {str(p.relative_to(copy)): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
        shutil.rmtree(copy)
        return files

    def bucket(self) -> dict[str, bytes]:
        """Return the objects that lie in the bucket of the S3 store, by their names."""
        store = self.store()
        if not store.bucket_exists("crashes"):
            return {}
        names = (one.object_name for one in store.list_objects("crashes", recursive=True))
        return {name: store.get_object("crashes", name).data for name in names if name}

    def close(self) -> None:
        """Remove what is on the host."""
        shutil.rmtree(self.directory, ignore_errors=True)
