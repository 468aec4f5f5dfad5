"""What the systemd units of this host are given, for the command beside them.

Without it the command would ask another bus, or another S3 server, than the services do, and a
snapshot would show what the site redacts. What stands in the environment comes first.
"""

import os
import re
import shlex
from pathlib import Path

from crashbus.errors import CrashbusError

DIRECTORY = Path("/etc/crashbus")
_SETTING = re.compile(r"\s*(CRASHBUS_\w+)\s*=(.*)")
# The units take their keys as credentials; each variable with those in whose place it stands.
_KEYS = {
    "CRASHBUS_NATS_NKEY_FILE": (
        "keys/operator/nkey",
        ("CRASHBUS_NATS_NKEY", "CRASHBUS_NATS_CREDENTIALS", "CRASHBUS_NATS_USER"),
    ),
    "CRASHBUS_SHIPPER_S3_ACCESS_KEY_FILE": ("s3-access-key", ("CRASHBUS_SHIPPER_S3_ACCESS_KEY",)),
    "CRASHBUS_SHIPPER_S3_SECRET_KEY_FILE": ("s3-secret-key", ("CRASHBUS_SHIPPER_S3_SECRET_KEY",)),
}


class UnitSettingsUnreadable(CrashbusError):
    """The units' file of settings is not of its form."""


def take_settings(directory: Path = DIRECTORY) -> None:
    """Put into the environment what the units' file sets, where that is there and ours to read.

    Raises:
        UnitSettingsUnreadable: a line of it cannot be read.
    """
    path = directory / "crashbus.env"
    if os.access(path, os.R_OK):
        for name, value in _settings(path).items():
            os.environ.setdefault(name, value)


def take_keys(directory: Path = DIRECTORY) -> None:
    """Name the keys of the operator and of the shippers, where no others are named."""
    for variable, (name, others) in _KEYS.items():
        if os.access(directory / name, os.R_OK) and not os.environ.keys() & {variable, *others}:
            os.environ[variable] = str(directory / name)


def _settings(path: Path) -> dict[str, str]:
    """Read a file as systemd does, EnvironmentFile= of systemd.exec(5)."""
    text = path.read_text(errors="surrogateescape").replace("\\\n", "")
    found = {}
    for match in filter(None, map(_SETTING.fullmatch, text.split("\n"))):
        try:
            found[match[1]] = " ".join(shlex.split(match[2]))
        except ValueError as error:  # its value may be a secret
            raise UnitSettingsUnreadable(f"{path}: {match[1]}: {error}") from None
    return found
