"""What a process had in use: memory in numbers, open files, sockets, mounts, its cgroup's limits.

It is read raw while the process is held, which is short, and parsed when nobody waits any more.
Sources: proc_pid_status(5), proc_pid_smaps_rollup (Documentation/filesystems/proc.rst),
proc_pid_fd(5), proc_pid_net(5), proc_pid_mountinfo(5), Documentation/admin-guide/cgroup-v1/ and
cgroup-v2.rst.
"""

import os
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crashbus import names
from services.common import redact

MAX_FILES = 1024  # descriptors looked at
_MAX_TABLE = 1024 * 1024  # bytes of one table of sockets: about 7,000
_MAX_MOUNTS = 64 * 1024  # bytes
_MAX_READ = 64 * 1024
_ROLLUP_UP_TO = 256 * 1024  # KiB resident; beyond, the kernel's walk would be a long hold

_NET = ("tcp", "tcp6", "udp", "udp6", "unix")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
# Version 2, then the controllers of version 1.
_CGROUP_FILES = {
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
_SOCKET = re.compile(r"socket:\[(\d{1,20})\]")


@dataclass(frozen=True)
class Resources:
    """All as the kernel wrote it.

    Attributes:
        open_files: descriptor to what it leads to, proc_pid_fd(5).
        more_files: there are others.
        tables: the sockets of its network namespace, by protocol.
    """

    status: bytes = b""
    rollup: bytes = b""
    open_files: dict[int, bytes] = field(default_factory=dict)
    more_files: bool = False
    tables: dict[str, bytes] = field(default_factory=dict)
    mounts: bytes = b""
    cgroup: dict[str, bytes] = field(default_factory=dict)
    oom_score_adj: bytes = b""


def read(task: int, cgroup: str | None) -> Resources:
    """Read everything of a held process; what cannot be read is left out.

    Args:
        task: a thread that still has its memory, as a name in /proc.
        cgroup: its path, as in proc_pid_cgroup(5).
    """
    proc = Path(f"/proc/{task}")
    status = _read(proc / "status")
    open_files, more = _open_files(proc / "fd")
    has_sockets = any(target.startswith(b"socket:") for target in open_files.values())
    return Resources(
        status=status,
        rollup=_read(proc / "smaps_rollup") if _resident(status) <= _ROLLUP_UP_TO else b"",
        open_files=open_files,
        more_files=more,
        tables={n: _read(proc / "net" / n, _MAX_TABLE) for n in _NET} if has_sockets else {},
        mounts=_read(proc / "mountinfo", _MAX_MOUNTS),
        cgroup=_cgroup(cgroup),
        oom_score_adj=_read(proc / "oom_score_adj"),
    )


def _open_files(directory: Path) -> tuple[dict[int, bytes], bool]:
    found: dict[int, bytes] = {}
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if len(found) == MAX_FILES:
                    return found, True
                try:
                    found[int(entry.name)] = os.readlink(bytes(directory / entry.name))  # noqa: PTH115 - may not be UTF-8
                except OSError:
                    continue
    except OSError:
        pass
    return found, False


def _cgroup(path: str | None) -> dict[str, bytes]:
    """Read the numbers of a cgroup, of version 1 or 2.

    Its path is the kernel's, but names of cgroups are chosen by whoever may make them.
    """
    if not path or ".." in path.split("/"):
        return {}
    return {
        name: raw
        for hierarchy, files in _CGROUP_FILES.items()
        for name in files
        if (raw := _read(_CGROUP_ROOT / hierarchy / path.lstrip("/") / name))
    }


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
        "Sockets": list(_sockets(found)),
        "Mounts": [redact.text(names.text(line)) for line in found.mounts.splitlines()],
        "CgroupNumbers": {k: names.text(v.strip()) for k, v in found.cgroup.items()},
    }


def _fields(raw: bytes) -> Iterator[tuple[str, str]]:
    for line in names.text(raw).splitlines():
        name, colon, value = line.partition(":")
        if colon and re.fullmatch(r"\w+", name):
            yield name, " ".join(value.split())


def _number(raw: bytes) -> int | None:
    try:
        return int(raw)
    except ValueError:
        return None


def _sockets(found: Resources) -> Iterator[dict[str, Any]]:
    """Give each socket that the process has open, with its ends."""
    holders = {
        match[1]: number
        for number, target in found.open_files.items()
        if (match := _SOCKET.fullmatch(names.text(target)))
    }
    for protocol, table in found.tables.items():
        rows = _unix_rows(table) if protocol == "unix" else _ip_rows(table)
        for inode, row in rows:
            if inode in holders:
                yield {"Fd": holders[inode], "Protocol": protocol, **row}


def _ip_rows(table: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in names.text(table).splitlines()[1:]:
        parts = line.split()
        if len(parts) < 10:
            return  # cut off
        row = {"Local": _endpoint(parts[1]), "Remote": _endpoint(parts[2])}
        yield parts[9], {**row, "State": _TCP_STATES[(int(parts[3], 16) - 1) % len(_TCP_STATES)]}


def _unix_rows(table: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in names.text(table).splitlines()[1:]:
        parts = line.split(maxsplit=7)
        if len(parts) < 7:
            return
        path = redact.text(parts[7]) if len(parts) > 7 else None
        yield parts[6], {"Path": path}


def _endpoint(text: str) -> str:
    """Return address and port of ``0100007F:1F90``: words in this machine's byte order."""
    address, _, port = text.partition(":")
    words = struct.pack(
        f"={len(address) // 8}I", *(int(address[i : i + 8], 16) for i in range(0, len(address), 8))
    )
    if len(words) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, words)}:{int(port, 16)}"
    return f"[{socket.inet_ntop(socket.AF_INET6, words)}]:{int(port, 16)}"


def _read(path: Path, limit: int = _MAX_READ) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError:
        return b""
