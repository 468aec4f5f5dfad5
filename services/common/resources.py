"""What a process had in use: memory in numbers, open files, sockets, mounts, its cgroup's limits.

It is read raw while the process is held, which is short, and parsed when nobody waits any more.
Sources: proc_pid_status(5), proc_pid_smaps_rollup (Documentation/filesystems/proc.rst),
proc_pid_fd(5), proc_pid_mountinfo(5), Documentation/admin-guide/cgroup-v1/ and
cgroup-v2.rst.
"""

import ctypes
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from crashbus import names
from services.common import redact
from services.common.proc import LIVE, Proc, lines, read_file

MAX_FILES = 1024  # descriptors looked at
MAX_SOCKETS = 256  # asked for their ends
MAX_MOUNTS = 64 * 1024  # bytes
_ROLLUP_UP_TO = 256 * 1024  # KiB resident; beyond, the kernel's walk would be a long hold

CGROUP_ROOT = "/sys/fs/cgroup"
# Version 2, then the controllers of version 1.
CGROUP_FILES = {
    **dict.fromkeys(
        ("", "unified"),
        (
            *("memory.current", "memory.peak", "memory.max", "memory.high", "memory.swap.current"),
            *("memory.events", "memory.oom.group", "pids.current", "pids.max", "cpu.max"),
        ),
    ),
    "memory": (
        *("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.limit_in_bytes"),
        *("memory.memsw.limit_in_bytes", "memory.failcnt", "memory.oom_control"),
    ),
    "pids": ("pids.current", "pids.max"),
}
# include/net/tcp_states.h, from 1 on
_TCP_STATES = (
    *("ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE"),
    *("CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV"),
)
_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_PIDFD_THREAD = os.O_EXCL  # include/uapi/linux/pidfd.h
_PIDFD_GETFD = 438  # its number on every architecture, pidfd_getfd(2)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Resources:
    """All as the kernel wrote it.

    Attributes:
        open_files: descriptor to what it leads to, proc_pid_fd(5).
        more_files: there are others.
        sockets: what each socket among them says of itself.
    """

    status: bytes = b""
    rollup: bytes = b""
    open_files: dict[int, bytes] = field(default_factory=dict)
    more_files: bool = False
    sockets: tuple[dict[str, Any], ...] = ()
    mounts: bytes = b""
    cgroup: dict[str, bytes] = field(default_factory=dict)
    oom_score_adj: bytes = b""


def read(task: int, cgroup: str | None, proc: Proc = LIVE) -> Resources:
    """Read everything of a held process; what cannot be read is left out.

    Args:
        task: a thread that still has its memory, as a name in /proc.
        cgroup: its path, as in proc_pid_cgroup(5).
    """
    status = proc.read(f"{task}/status")
    open_files, more = _open_files(f"{task}/fd", proc)
    return Resources(
        status=status,
        rollup=proc.read(f"{task}/smaps_rollup") if _resident(status) <= _ROLLUP_UP_TO else b"",
        open_files=open_files,
        more_files=more,
        sockets=tuple(sockets(task, open_files)),
        mounts=read_mounts(task, proc),
        cgroup=_cgroup(cgroup),
        oom_score_adj=proc.read(f"{task}/oom_score_adj"),
    )


def read_mounts(task: int, proc: Proc) -> bytes:
    """Return proc_pid_mountinfo(5), as far as it is looked at."""
    return proc.read(f"{task}/mountinfo", MAX_MOUNTS)


def _open_files(directory: str, proc: Proc) -> tuple[dict[int, bytes], bool]:
    numbers = proc.list(directory, MAX_FILES + 1)
    links = {int(number): proc.link(f"{directory}/{number}") for number in numbers[:MAX_FILES]}
    found = {number: target for number, target in links.items() if target is not None}
    return found, len(numbers) > MAX_FILES


def sockets(task: int, open_files: dict[int, bytes]) -> Iterator[dict[str, Any]]:
    """Ask each socket for its ends, through a copy of the descriptor, pidfd_getfd(2).

    The tables in /proc/<pid>/net list all of the host's, which takes milliseconds.

    Args:
        task: a thread that still has its descriptors.
    """
    numbers = [n for n, target in sorted(open_files.items()) if target.startswith(b"socket:")]
    if not numbers:
        return
    process = _pidfd(task)
    if process < 0:
        return
    try:
        for number in numbers[:MAX_SOCKETS]:
            copy = _libc.syscall(_PIDFD_GETFD, process, number, 0)
            if copy >= 0:
                yield {"Fd": number, **_socket(copy)}
    finally:
        os.close(process)


def _pidfd(task: int) -> int:
    """Open a thread; where the first of its process has ended, it is another. -1: it cannot be."""
    with suppress(OSError):
        return os.pidfd_open(task)
    with suppress(OSError):  # before Linux 6.9
        return os.pidfd_open(task, _PIDFD_THREAD)
    return -1


def _socket(descriptor: int) -> dict[str, Any]:
    """Describe a socket and close this descriptor of it."""
    try:
        one = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        return {}
    with one:
        told: dict[str, Any] = {"Family": _name(one.family), "Type": _name(one.type)}
        if one.family == socket.AF_UNIX:
            return told | {"Path": _end(one.getsockname), "Peer": _end(one.getpeername)}
        told |= {"Local": _end(one.getsockname), "Remote": _end(one.getpeername)}
        if one.proto == socket.IPPROTO_TCP:
            with suppress(OSError):
                state = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
                told["State"] = _TCP_STATES[(state - 1) % len(_TCP_STATES)]
        return told


def _name(value: object) -> str:
    return getattr(value, "name", str(value))


def _end(ask: Callable[[], Any]) -> str | None:
    """Return one end of a socket as text; None where it has none."""
    try:
        end = ask()
    except (OSError, ValueError):
        return None
    if isinstance(end, tuple) and len(end) >= 2:
        host = f"[{end[0]}]" if ":" in str(end[0]) else end[0]
        end = f"{host}:{end[1]}"
    # Of a path that is no UTF-8 Python makes surrogates, which no JSON can hold.
    return names.text(end if isinstance(end, bytes) else os.fsencode(str(end))) or None


def _cgroup(path: str | None) -> dict[str, bytes]:
    """Read the numbers of a cgroup, of version 1 or 2.

    Its path is the kernel's, but names of cgroups are chosen by whoever may make them.
    """
    if not path or ".." in path.split("/"):
        return {}
    found: dict[str, bytes] = {}
    for hierarchy, files in CGROUP_FILES.items():
        try:
            place = os.open(f"{CGROUP_ROOT}/{hierarchy}/{path}", _PLACE)
        except OSError:
            continue
        try:
            found |= {name: raw for name in files if (raw := read_file(name, at=place))}
        finally:
            os.close(place)
    return found


def _resident(status: bytes) -> int:
    match = re.search(rb"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) if match else 0


def describe(found: Resources) -> dict[str, Any]:
    """Return what ``snapshot`` shows of it, secrets taken out."""
    files = [
        {"Fd": number, "Target": redact.text(names.text(target))}
        for number, target in sorted(found.open_files.items())
    ]
    return {
        "Status": dict(_fields(found.status)),
        "Memory": dict(_fields(found.rollup)),
        "OomScoreAdj": _number(found.oom_score_adj),
        "OpenFiles": files,
        "MoreOpenFiles": found.more_files,
        "Sockets": [
            {k: redact.text(v) if isinstance(v, str) else v for k, v in one.items()}
            for one in found.sockets
        ],
        "Mounts": [redact.text(names.text(line)) for line in lines(found.mounts)],
        "CgroupNumbers": {k: names.text(v.strip()) for k, v in found.cgroup.items()},
    }


def _fields(raw: bytes) -> Iterator[tuple[str, str]]:
    for line in lines(raw):
        name, colon, value = names.text(line).partition(":")
        if colon and re.fullmatch(r"\w+", name):
            yield name, " ".join(value.split())


def _number(raw: bytes) -> int | None:
    try:
        return int(raw)
    except ValueError:
        return None
