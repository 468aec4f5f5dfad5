"""What /proc tells of a process, read once while it is there.

All of it was written by the process, so it is cut to a size and made readable text. Sources:
proc_pid_stat(5), proc_pid_status(5), proc_pid_cmdline(5), proc_pid_cgroup(5).
"""

import re
from collections.abc import Iterable, Iterator

from crashbus import identity, names
from crashbus.fields import MAX_PATH
from crashbus.parts import Container, Process
from services.common import redact
from services.common.proc import LIVE, Proc, lines

MAX_ARGUMENTS = 64
MAX_ARGUMENT_BYTES = 4096  # of UTF-8; a byte that is none takes four
# Of all arguments together: the message that carries them must stay far below the bus's limit
# of 1 MiB.
MAX_COMMAND_LINE = 64 * 1024  # bytes of UTF-8
MAX_READ = 256 * 1024
# Of one argument, before secrets are taken out: that takes time, and anybody can give long ones.
MAX_LOOKED_AT = 8 * 1024  # bytes

_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_RUNTIMES = (
    ("docker", "docker"),
    ("containerd", "containerd"),
    ("crio", "crio"),
    ("libpod", "podman"),
    ("lxc", "lxc"),
)


def read_process(pid: int, boot_id: str, proc: Proc = LIVE) -> Process:
    """Read a living (or held) process.

    Args:
        proc: where; what it remembers is of one process for sure.

    Raises:
        ProcessLookupError: it is gone, or was when reading ended.
    """
    start = _start_ticks(pid, proc)
    try:
        status = status_in(proc.read(f"{pid}/status"))
        process = Process(
            boot_id=boot_id,
            pid=pid,
            ns_pid=int(status.get("NSpid", str(pid)).split()[-1]),
            start_ticks=start,
            uid=int(status["Uid"].split()[0]),
            gid=int(status["Gid"].split()[0]),
            comm=names.text(proc.read(f"{pid}/comm").rstrip(b"\n")),
            executable=executable(pid, proc),
            command_line=command_line(pid, proc),
            cgroup=(group := cgroup(pid, proc)),
            container=container_of(group),
        )
    except KeyError as gone:
        raise ProcessLookupError(f"process {pid} is gone") from gone
    if _start_ticks(pid, proc) != start:
        raise ProcessLookupError(f"process {pid} is gone, its PID was given again")
    return process


def _start_ticks(pid: int, proc: Proc) -> int:
    stat = proc.read(f"{pid}/stat")
    if not stat:
        raise ProcessLookupError(f"process {pid} is gone")
    return identity.start_ticks_in(stat)


def executable(pid: int, proc: Proc = LIVE) -> str | None:
    """Return the path of the executable, as the process's own root shows it."""
    path = proc.link(f"{pid}/exe")
    return None if path is None else names.text(path)[:MAX_PATH]


def command_line(pid: int, proc: Proc = LIVE) -> tuple[str, ...]:
    """Return the arguments: at most 64, each of at most 4 KiB, and 64 KiB of text in all."""
    raw = raw_command_line(pid, proc)
    return split_arguments(raw, is_cut=len(raw) >= MAX_READ)


def raw_command_line(pid: int, proc: Proc) -> bytes:
    """Return the arguments as the kernel tells them, as far as they are looked at."""
    return proc.read(f"{pid}/cmdline", MAX_READ)


def split_arguments(raw: bytes, is_cut: bool = False) -> tuple[str, ...]:
    """Return NUL-separated arguments as readable text, without secrets, cut to their limits.

    In this order: a secret that is cut in half is not seen to be one.

    Args:
        is_cut: the last one had more.
    """
    given = raw.removesuffix(b"\0").split(b"\0") if raw else []
    cut = {number for number, one in enumerate(given) if len(one) > MAX_LOOKED_AT}
    if is_cut:
        cut.add(len(given) - 1)
    texts = tuple(names.text(one[:MAX_LOOKED_AT]) for one in given[:MAX_ARGUMENTS])
    # One after the other: those for which there is no room cost nothing.
    shown = redact.arguments(texts, cut)
    return tuple(_within(MAX_COMMAND_LINE, (_cut(one, MAX_ARGUMENT_BYTES) for one in shown)))


def _within(room: int, texts: Iterable[str]) -> Iterator[str]:
    """Yield the first texts that have room together, in bytes of UTF-8; the last is cut."""
    for text in texts:
        cut = _cut(text, room)
        yield cut
        room -= len(cut.encode())
        if room <= 0 or cut != text:
            return


def _cut(text: str, room: int) -> str:
    """Return as much of it as has room; a character that would be cut in half is left out."""
    return text.encode()[:room].decode("utf-8", "ignore")


def cgroup(pid: int, proc: Proc = LIVE) -> str | None:
    """Return the cgroup path: of version 2, else of the longest version 1 hierarchy."""
    return cgroup_in(proc.read(f"{pid}/cgroup"))


def cgroup_in(raw: bytes) -> str | None:
    """Return the cgroup path that a proc_pid_cgroup(5) tells, as `cgroup` does."""
    paths = {}
    for line in lines(raw):
        hierarchy, _, rest = names.text(line).partition(":")
        paths[hierarchy] = rest.partition(":")[2]
    unified = paths.pop("0", "")
    return max([unified, *paths.values()], key=len)[:MAX_PATH] or None


def container_of(group: str | None) -> Container | None:
    """Return the container that a cgroup path names, by the 64 digits all runtimes put there.

    In a container in a container it is the outer one, which the host's runtime knows: whoever may
    make cgroups in a container names them as he likes.
    """
    found = _CONTAINER_ID.search(group or "")
    if found is None:
        return None
    before = found.string[: found.start()]
    place, runtime = max((before.rfind(mark), name) for mark, name in _RUNTIMES)
    return Container(id=found[0], runtime=runtime if place >= 0 else "unknown")


def status_in(raw: bytes) -> dict[str, str]:
    """Return the fields of a proc_pid_status(5)."""
    fields = (names.text(line).partition(":") for line in lines(raw))
    return {key: value.strip() for key, _, value in fields}
