"""What deploy/setup.sh installs harms no host that has more than it needs."""

import re
import subprocess
from pathlib import Path

from tests.support.requirements import lacking

SETUP = Path(__file__).parents[2] / "deploy" / "setup.sh"


def packages() -> list[str]:
    """Return all that it may install."""
    code = re.sub(r" #.*", "", SETUP.read_text())
    return [name for some in re.findall(r"packages\+?=\(([^)]*)\)", code) for name in some.split()]


def test_a_host_keeps_its_busybox() -> None:
    if subprocess.run(["apt-cache", "show", "busybox"], capture_output=True).returncode:
        lacking("needs the lists of packages: apt-get update")
    wanted = packages()

    command = ["apt-get", "install", "--simulate", "--no-install-recommends", "busybox", *wanted]
    done = subprocess.run(command, capture_output=True, text=True)

    assert {"qemu-system-x86", "gdb", "docker.io"} < {*wanted}
    assert done.returncode == 0, done.stdout + done.stderr
