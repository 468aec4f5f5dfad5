"""How the kernel hands over a core: which ways there are, and which one a kernel has.

See core(5) and the kernel's include/uapi/linux/coredump.h.
"""

import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

from services.recorder.errors import RecorderError

MAX_PATTERN = 127  # bytes, CORENAME_MAX_SIZE without its NUL
MAX_SOCKET_PATH = 107  # bytes, sun_path without its NUL, unix(7)
# Crashes at once; the kernel skips those above. Without a limit above 0 it does not wait until a
# helper, or in 6.16 the socket's owner, has read /proc.
PIPE_LIMIT = 4096
HELPER = "corepipe"  # as the kernel finds it, in the state directory
_NOBODY = "-"  # to the helper, in place of a socket: there is no recorder

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
    """What to write into /proc/sys/kernel/core_pattern.

    Attributes:
        pattern: while the recorder runs.
        stand_in: once it was killed, so that the pipe helper keeps crashes for the next one; None
            where there is no helper.
    """

    mechanism: Mechanism
    pattern: str
    stand_in: str | None


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
    pattern = _pattern(mechanism, socket, helper)
    if templates:
        pattern = f"{pattern} {templates}"
    if not _fits(pattern):
        raise RecorderError(
            f"core_pattern holds {MAX_PATTERN} bytes, {pattern!r} is longer: shorten "
            "CRASHBUS_RECORDER_SOCKET or CRASHBUS_STATE"
            + (", or switch CRASHBUS_RECORDER_CHAIN off" if templates else "")
        )
    if mechanism is Mechanism.PIPE:
        return Plan(mechanism, pattern, pattern)
    # The next recorder's socket is there a moment before its core_pattern, and knows no helper.
    stand_in = f"|{helper} {_NOBODY} {_HELPER_ARGUMENTS}"
    return Plan(mechanism, pattern, stand_in if _fits(stand_in) else None)


def _pattern(mechanism: Mechanism, socket: Path, helper: Path) -> str:
    if mechanism is Mechanism.SOCKET_REQUEST:
        return f"@@{socket}"
    if mechanism is Mechanism.SOCKET:
        return f"@{socket}"
    return f"|{helper} {socket} {_HELPER_ARGUMENTS}"


def _fits(pattern: str) -> bool:
    return len(os.fsencode(pattern)) <= MAX_PATTERN


def helper_of(pattern: str) -> Path | None:
    """Return the pipe helper of a recorder, whichever state directory it has, that a core_pattern
    names; None where it names none.
    """
    program = Path(pattern[1:].partition(" ")[0])
    return program if pattern.startswith("|") and program.name == HELPER else None


def owner(pattern: str) -> str:
    """Say in words who gets the cores with this core_pattern."""
    if pattern.startswith("|"):
        program, _, arguments = pattern[1:].partition(" ")
        name = Path(program).name or "a pipe helper"
        stands_in = name == HELPER and arguments.startswith(f"{_NOBODY} ")
        return f"{name}, which keeps them for the next recorder" if stands_in else name
    if pattern.startswith("@"):
        return f"the coredump socket {pattern.lstrip('@')}"
    return f"the kernel itself, as files named {pattern!r}" if pattern else "nobody"
