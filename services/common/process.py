"""What /proc tells of a process, read once while it is there.

All of it was written by the process, so it is cut to a size and made readable text. Sources:
proc_pid_stat(5), proc_pid_status(5), proc_pid_cmdline(5), proc_pid_cgroup(5).
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from crashbus import identity, names
from crashbus.messages import MAX_PATH, Container, Process
from services.common import redact

MAX_ARGUMENTS = 64
MAX_ARGUMENT_BYTES = 4096
# Of all arguments together: bytes that are no UTF-8 take four characters each, and the
# message that carries them must stay far below the bus's limit of 1 MiB.
MAX_COMMAND_LINE = 64 * 1024  # bytes of UTF-8
_MAX_READ = MAX_ARGUMENTS * MAX_ARGUMENT_BYTES

_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_RUNTIMES = (
    ("docker", "docker"),
    ("cri-containerd", "containerd"),
    ("containerd", "containerd"),
    ("crio", "crio"),
    ("libpod", "podman"),
    ("lxc", "lxc"),
)


def read_process(pid: int, boot_id: str) -> Process:
    """Read a living (or held) process.

    Raises:
        ProcessLookupError: it is gone, or was when reading ended.
    """
    proc = Path("/proc") / str(pid)
    start = identity.start_ticks(pid)
    try:
        status = status_in((proc / "status").read_bytes())
        process = Process(
            boot_id=boot_id,
            pid=pid,
            ns_pid=int(status.get("NSpid", str(pid)).split()[-1]),
            start_ticks=start,
            uid=int(status["Uid"].split()[0]),
            gid=int(status["Gid"].split()[0]),
            comm=names.text((proc / "comm").read_bytes().rstrip(b"\n")),
            executable=executable(pid),
            command_line=command_line(pid),
            cgroup=(group := cgroup(pid)),
            container=container_of(group),
        )
    except (FileNotFoundError, KeyError) as gone:
        raise ProcessLookupError(f"process {pid} is gone") from gone
    if identity.start_ticks(pid) != start:
        raise ProcessLookupError(f"process {pid} is gone, its PID was given again")
    return process


def executable(pid: int) -> str | None:
    """Return the path of the executable, as the process's own root shows it."""
    try:
        path = os.readlink(f"/proc/{pid}/exe".encode())  # noqa: PTH115 - may not be UTF-8
    except OSError:
        return None
    return names.text(path)[:MAX_PATH]


def command_line(pid: int) -> tuple[str, ...]:
    """Return the arguments: at most 64, each of at most 4 KiB, and 64 KiB of text in all."""
    try:
        with Path(f"/proc/{pid}/cmdline").open("rb") as file:
            raw = file.read(_MAX_READ)
    except OSError:
        return ()
    return split_arguments(raw)


def split_arguments(raw: bytes) -> tuple[str, ...]:
    """Return NUL-separated arguments as readable text, cut to their limits, without secrets."""
    arguments = raw.removesuffix(b"\0").split(b"\0") if raw else []
    texts = tuple(names.text(one[:MAX_ARGUMENT_BYTES]) for one in arguments[:MAX_ARGUMENTS])
    return tuple(_within(MAX_COMMAND_LINE, redact.arguments(texts)))


def _within(room: int, texts: Iterable[str]) -> Iterator[str]:
    """Yield the first texts that have room together, in bytes of UTF-8; the last is cut."""
    for text in texts:
        raw = text.encode()[:room]
        yield raw.decode("utf-8", "ignore")  # a character that was cut in half is left out
        room -= len(raw)
        if room <= 0:
            return


def cgroup(pid: int) -> str | None:
    """Return the cgroup path: of version 2, else of the longest version 1 hierarchy."""
    try:
        raw = Path(f"/proc/{pid}/cgroup").read_bytes()[:_MAX_READ]
    except OSError:
        return None
    return cgroup_in(raw)


def cgroup_in(raw: bytes) -> str | None:
    """Return the cgroup path that a proc_pid_cgroup(5) tells, as `cgroup` does."""
    paths = {}
    for line in names.text(raw).splitlines():
        hierarchy, _, rest = line.partition(":")
        paths[hierarchy] = rest.partition(":")[2]
    unified = paths.pop("0", "")
    return max([unified, *paths.values()], key=len)[:MAX_PATH] or None


def container_of(group: str | None) -> Container | None:
    """Return the container that a cgroup path names, by the 64 digits all runtimes put there."""
    found = _CONTAINER_ID.findall(group or "")
    if not found:
        return None
    runtime = next((name for mark, name in _RUNTIMES if mark in (group or "")), "unknown")
    return Container(id=found[-1], runtime=runtime)


def status_in(raw: bytes) -> dict[str, str]:
    """Return the fields of a proc_pid_status(5)."""
    lines = names.text(raw).splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
