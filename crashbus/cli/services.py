"""``crashbus detector|recorder|collector|shipper``: become that service."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from crashbus.cli import site

SERVICES = {
    "detector": "See every crash signal and OOM kill of this host (eBPF).",
    "recorder": "Make the crash files of every process that dies.",
    "collector": "Gather crash files and put them on the bus.",
    "shipper": "Deliver crash files from the bus to destinations.",
}

# One module of each package that a service's extra brings and others may lack.
_NEEDS = {
    "detector": ("structlog",),
    "recorder": ("structlog", "drgn", "capstone"),
    "collector": ("structlog", "asyncinotify"),
    "shipper": ("structlog", "minio", "tenacity"),
}


def need(service: str) -> None:
    """End with a word about it if a service's packages are not installed."""
    lacking = [module for module in _NEEDS[service] if find_spec(module) is None]
    if lacking:
        sys.stderr.write(
            f"crashbus {service}: not installed here: {', '.join(lacking)}; "
            f"pip install 'crashbus[{service}]'\n"
        )
        sys.exit(2)  # as for a wrong setting: a restart does not help


def become(service: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by a service, which has a key of its own."""
    site.take_settings()
    need(service)
    sys.stdout.flush()
    command = [sys.executable, "-m", f"services.{service}", *arguments]
    os.execv(command[0], command)  # noqa: S606 - it is to take our place
