"""How the kernel hands over a core: which ways there are, and which one a kernel has.

See core(5) and the kernel's include/uapi/linux/coredump.h.
"""

import os
import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Literal

from services.recorder.errors import RecorderError

MAX_PATTERN = 127  # bytes, CORENAME_MAX_SIZE without its NUL
MAX_SOCKET_PATH = 107  # bytes, sun_path without its NUL, unix(7)
PIPE_LIMIT = 4096  # crashes at once; the kernel skips those above

# What the helper is told, %-specifiers of core(5): PID and TID in the initial namespace,
# signal, Unix time.
_HELPER_ARGUMENTS = "%P %I %s %t"

_FIRST_WITH_SOCKET = (6, 16)
_FIRST_WITH_REQUEST = (6, 17)


class Mechanism(Enum):
    """A way in which cores arrive."""

    SOCKET_REQUEST = "coredump socket with request and acknowledgement"
    SOCKET = "coredump socket"
    PIPE = "pipe helper"


@dataclass(frozen=True)
class Plan:
    """What to write into /proc/sys/kernel.

    Attributes:
        pattern: for core_pattern.
        pipe_limit: for core_pipe_limit; None where it does not matter.
    """

    mechanism: Mechanism
    pattern: str
    pipe_limit: int | None


def kernel_version(release: str) -> tuple[int, int]:
    """Return major and minor version of a release such as ``6.18.44-cloud``."""
    match = re.match(r"(\d+)\.(\d+)", release)
    if not match:
        raise RecorderError(f"the kernel's release {release!r} has no version")
    return int(match[1]), int(match[2])


def choose(
    wanted: Literal["auto", "socket", "pipe"], version: tuple[int, int], chains: bool = False
) -> Mechanism:
    """Return the mechanism to use.

    Args:
        chains: a former handler is to be started, as only the pipe helper can.

    Raises:
        RecorderError: the wanted one is not in this kernel, or starts no handler.
    """
    if chains and wanted == "socket":
        raise RecorderError(
            "the former handler of cores is started by the pipe helper "
            "(CRASHBUS_RECORDER_CHAIN): set CRASHBUS_RECORDER_MECHANISM to auto or pipe"
        )
    if wanted == "pipe" or chains:
        return Mechanism.PIPE
    if version >= _FIRST_WITH_REQUEST:
        return Mechanism.SOCKET_REQUEST
    if version >= _FIRST_WITH_SOCKET:
        return Mechanism.SOCKET
    if wanted == "socket":
        found = ".".join(map(str, version))
        raise RecorderError(
            f"the coredump socket needs Linux 6.16, this is {found}: set "
            "CRASHBUS_RECORDER_MECHANISM to auto or pipe"
        )
    return Mechanism.PIPE


def plan(mechanism: Mechanism, socket: Path, helper: Path, templates: str = "") -> Plan:
    """Return what to tell the kernel.

    Args:
        helper: where the kernel finds the pipe helper.
        templates: of core(5), that the kernel shall expand for it besides; see `chain`.

    Raises:
        RecorderError: a path is too long, or has a character that core_pattern gives a meaning.
    """
    if len(bytes(socket)) > MAX_SOCKET_PATH:
        raise RecorderError(
            f"{socket} is longer than the {MAX_SOCKET_PATH} bytes of a socket's path: set "
            "CRASHBUS_RECORDER_SOCKET to a shorter one"
        )
    for path in (socket, helper):
        if not path.is_absolute() or re.search(r"[\s%]", str(path)):
            raise RecorderError(
                f"{path} cannot stand in core_pattern: it must be absolute, "
                "without spaces and percent signs"
            )
    plan = _plan(mechanism, socket, helper)
    if templates:
        plan = replace(plan, pattern=f"{plan.pattern} {templates}")
    if len(os.fsencode(plan.pattern)) > MAX_PATTERN:
        raise RecorderError(
            f"core_pattern holds {MAX_PATTERN} bytes, {plan.pattern!r} is longer: shorten "
            "CRASHBUS_RECORDER_SOCKET or CRASHBUS_STATE"
            + (", or switch CRASHBUS_RECORDER_CHAIN off" if templates else "")
        )
    return plan


def _plan(mechanism: Mechanism, socket: Path, helper: Path) -> Plan:
    if mechanism is Mechanism.SOCKET_REQUEST:
        # The acknowledgement itself says that the kernel shall wait for us.
        return Plan(mechanism, f"@@{socket}", None)
    if mechanism is Mechanism.SOCKET:
        # Without a limit above 0 the kernel does not wait until we have read /proc.
        return Plan(mechanism, f"@{socket}", PIPE_LIMIT)
    return Plan(mechanism, f"|{helper} {socket} {_HELPER_ARGUMENTS}", PIPE_LIMIT)


def owner(pattern: str) -> str:
    """Say in words who gets the cores with this core_pattern."""
    if pattern.startswith("|"):
        program = pattern[1:].split(" ")[0]
        return Path(program).name or "a pipe helper"
    if pattern.startswith("@"):
        return f"the coredump socket {pattern.lstrip('@')}"
    return f"the kernel itself, as files named {pattern!r}" if pattern else "nobody"
