"""What deploy/setup.sh installs harms no host that has more than it needs."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from tests.support.requirements import lacking, need_program

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


def test_what_is_installed_does_not_start_with_the_host(tmp_path: Path) -> None:
    """The unit of a server is often in a package that its own needs: nginx-common, containerd."""
    need_program("systemctl")
    host, clone, programs = tmp_path / "host", tmp_path / "clone", tmp_path / "programs"
    (clone / "deploy").mkdir(parents=True)
    setup = clone / "deploy" / "setup.sh"
    setup.write_text(SETUP.read_text().replace("/usr/sbin/policy-rc.d", str(tmp_path / "policy")))
    units = host / "usr" / "lib" / "systemd" / "system"
    units.mkdir(parents=True)
    for name in ("there.service", "needed.service", "needed.socket"):
        (units / name).write_text("[Install]\nWantedBy=multi-user.target\n")
    of_host = [str(shutil.which("systemctl")), f"--root={host}"]
    subprocess.run([*of_host, "enable", "there.service"], check=True, capture_output=True)
    programs.mkdir()
    for name, does in {
        "dpkg-query": ":",  # no package is there
        "id": "echo 0",
        "apt-get": f"[ $1 = update ] || {shlex.join(of_host)} enable needed.service needed.socket",
        "systemctl": f'exec {shlex.join(of_host)} "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}

    done = subprocess.run(["bash", setup, "--build"], env=os.environ | path, capture_output=True)

    assert done.returncode == 0, done.stderr
    wanted = host / "etc" / "systemd" / "system" / "multi-user.target.wants"
    assert [one.name for one in wanted.iterdir()] == ["there.service"]
