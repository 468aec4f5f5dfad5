"""What the systemd units of this host are given, for the command beside them.

Without it the command would ask another bus, or another S3 server, than the services do, and a
snapshot would show what the site redacts. What stands in the environment comes first.
"""

import os
import re
import sys
from pathlib import Path

from crashbus.cli import env_file

DIRECTORY = Path("/etc/crashbus")
_OURS = re.compile(r"CRASHBUS_[A-Z0-9_]+")
_CONTINUED = re.compile(r"^[ \t]*[#;].*\\$", re.MULTILINE)
# The units take their keys as credentials; each variable with those in whose place it stands.
_KEYS = {
    "CRASHBUS_NATS_NKEY_FILE": (
        "keys/operator/nkey",
        ("CRASHBUS_NATS_NKEY", "CRASHBUS_NATS_CREDENTIALS", "CRASHBUS_NATS_USER"),
    ),
    "CRASHBUS_SHIPPER_S3_ACCESS_KEY_FILE": ("s3-access-key", ("CRASHBUS_SHIPPER_S3_ACCESS_KEY",)),
    "CRASHBUS_SHIPPER_S3_SECRET_KEY_FILE": ("s3-secret-key", ("CRASHBUS_SHIPPER_S3_SECRET_KEY",)),
}


def take_settings(directory: Path = DIRECTORY) -> None:
    """Put into the environment what the units' file sets, where that is there and ours to read.

    What is wrong with it is told: the units have the same trouble, and no command need end for it.
    """
    path = directory / "crashbus.env"
    if not os.access(path, os.R_OK):
        return
    try:
        text = path.read_bytes().decode()
        if _CONTINUED.search(text):
            _tell(path, "a comment ends in a backslash, which some systemd takes to go on")
        found = {}  # the last of those with one name counts
        for setting in env_file.read(text):
            if not setting.is_closed:
                _tell(path, f"the quote that begins the value of {setting.name!r} has no end")
            if _OURS.fullmatch(setting.name):
                found[setting.name] = setting.value
        for name, value in found.items():
            os.environ.setdefault(name, value)
    except (OSError, ValueError) as error:  # no UTF-8, or a NUL in it; a value may be a secret
        _tell(path, f"cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}")


def _tell(path: Path, what: str) -> None:
    sys.stderr.write(f"crashbus: {path}: {what}\n")


def take_keys(directory: Path = DIRECTORY) -> None:
    """Name the keys of the operator and of the shippers, where no others are named."""
    for variable, (name, others) in _KEYS.items():
        if os.access(directory / name, os.R_OK) and not os.environ.keys() & {variable, *others}:
            os.environ[variable] = str(directory / name)
