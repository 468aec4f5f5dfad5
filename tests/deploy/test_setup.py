"""What deploy/setup.sh installs harms no host that has more than it needs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.support.requirements import lacking

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "deploy" / "setup.sh"


def packages() -> list[str]:
    """Return all that it may install."""
    code = re.sub(r" #.*", "", SETUP.read_text())
    found = re.findall(r"\b(?:packages|others)\+?=\(([^)$]*)\)", code)
    return [name for some in found for name in some.split()]


def test_a_host_keeps_its_busybox() -> None:
    if subprocess.run(["apt-cache", "show", "busybox"], capture_output=True).returncode:
        lacking("needs the lists of packages: apt-get update")
    wanted = packages()

    command = ["apt-get", "install", "--simulate", "--no-install-recommends", "busybox", *wanted]
    done = subprocess.run(command, capture_output=True, text=True)

    assert {"qemu-system-x86", "gdb", "docker.io"} < {*wanted}
    assert done.returncode == 0, done.stdout + done.stderr


def test_host_that_just_runs_the_services_gets_nothing_of_demo_and_tests(tmp_path: Path) -> None:
    """In a clone where nothing was built, on a machine without any package, and on this one."""
    for name in ("deploy", "services/recorder/helper", "services/recorder/taker"):
        shutil.copytree(ROOT / name, tmp_path / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("dpkg-query", "id"):  # no package is there, and we are not root
        (programs / name).write_text("#!/bin/sh\necho 1000\n")
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    command = [str(tmp_path / "deploy" / "setup.sh"), "--build"]

    told = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    missing = told.stderr.splitlines()[0].removeprefix("setup: missing: ").split()
    assert set(missing) == {
        *("python3-venv", "python3-bpfcc", "linux-libc-dev", "gcc", "libc6-dev")
    }
    made = {one.name for one in (tmp_path / "build").iterdir()}
    assert made == {"corepipe", "taker.so"}
    assert not (tmp_path / ".venv").exists()


def test_what_is_installed_does_not_start_with_the_host() -> None:
    (pick,) = re.findall(r"sed -nE '([^']*systemd[^']*)'", SETUP.read_text())
    installed = "docker.service", "docker.socket", "ceph.target", "ceph-mon@.service"
    lines = "".join(f"/lib/systemd/system/{name}\n" for name in (*installed, "x.wants/y.service"))

    done = subprocess.run(["sed", "-nE", pick], input=lines, capture_output=True, text=True)

    assert done.stdout.split() == ["docker.service", "docker.socket", "ceph.target"]
