"""What the eBPF program writes into the ring buffer, read into a typed record."""

import struct
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from crashbus.errors import CrashbusError

# struct event of bpf/detector.bpf.c, up to its text.
_HEAD = struct.Struct("=5Q4qQ6I4iI5Hh4x16s")
_NAMES = (
    *("monotonic_ns", "start_boottime", "detail", "handler", "handler_flags"),
    *("total_vm", "file_rss", "anon_rss", "shmem_rss", "core_limit"),
    *("kind", "pid", "tid", "ns_pid", "uid", "gid"),
    *("signal", "code", "error", "oom_score_adj", "arguments_size", "flags"),
    *("cgroup_end", "cgroup_v1_end", "executable_end", "text_end", "dumpable", "comm"),
)
_ENDS = ("cgroup_end", "cgroup_v1_end", "executable_end", "text_end")
_EXECUTABLE_WHOLE, _CGROUP_WHOLE, _CGROUP_V1_WHOLE = 1, 2, 4


class MalformedRecord(CrashbusError):
    """The kernel's record is not what this version reads: program and reader differ."""


class Kind(IntEnum):
    """Which program saw it."""

    SIGNAL = 1
    OOM_KILL = 2


@dataclass(frozen=True)
class Record:
    """One signal, or one choice of the OOM killer, as the kernel saw it.

    Attributes:
        monotonic_ns: CLOCK_MONOTONIC of the moment.
        start_boottime: start of the process in ns since boot; 0: not known.
        detail: siginfo's bytes 16 to 23: fault address, or PID and UID of a sender.
        total_vm: pages, as file_rss, anon_rss and shmem_rss; -1: not known.
        core_limit: RLIMIT_CORE in bytes, if dumpable is known.
        dumpable: what PR_GET_DUMPABLE tells, prctl(2); -1: not known.
        comm: of the thread group's leader.
        cgroup: path in version 2; None: not read whole.
        cgroup_v1: path in the memory controller's hierarchy of version 1; None: as above.
        executable: path; None: not read whole.
        arguments: NUL-separated, at most 1 KiB.
        arguments_size: how long they really are.
    """

    kind: Kind
    monotonic_ns: int
    start_boottime: int
    detail: int
    handler: int
    handler_flags: int
    total_vm: int
    file_rss: int
    anon_rss: int
    shmem_rss: int
    core_limit: int
    pid: int
    tid: int
    ns_pid: int
    uid: int
    gid: int
    signal: int
    code: int
    error: int
    oom_score_adj: int
    dumpable: int
    comm: bytes
    cgroup: bytes | None
    cgroup_v1: bytes | None
    executable: bytes | None
    arguments: bytes
    arguments_size: int

    @property
    def start_ticks(self) -> int:
        """Field 22 of /proc/PID/stat: USER_HZ is 100 on every architecture we run on."""
        return self.start_boottime // 10_000_000

    @property
    def arguments_whole(self) -> bool:
        """Whether all arguments are here, and lie where the process got them.

        A process that writes its own title may run on beyond their end, proc_pid_cmdline(5).
        """
        return len(self.arguments) == self.arguments_size > 0 and self.arguments[-1] == 0


def parse(raw: bytes) -> Record:
    """Read one record.

    Raises:
        MalformedRecord: it is cut short or contradicts itself.
    """
    try:
        head = dict(zip(_NAMES, _HEAD.unpack_from(raw), strict=True))
        kind = Kind(head.pop("kind"))
    except (struct.error, ValueError) as fault:
        raise MalformedRecord(f"{len(raw)} bytes: {fault}") from None
    ends = [0, *(head.pop(name) for name in _ENDS)]
    text = raw[_HEAD.size : _HEAD.size + ends[-1]]
    if ends != sorted(ends) or len(text) != ends[-1]:
        raise MalformedRecord(f"{len(raw)} bytes: the parts of its text end at {ends}")
    cgroup, cgroup_v1, executable, arguments = (text[a:b] for a, b in pairwise(ends))
    flags = head.pop("flags")
    comm = head.pop("comm").partition(b"\0")[0]
    return Record(
        **head,
        kind=kind,
        comm=comm,
        cgroup=_path(cgroup, flags & _CGROUP_WHOLE),
        cgroup_v1=_path(cgroup_v1, flags & _CGROUP_V1_WHOLE),
        executable=_path(executable, flags & _EXECUTABLE_WHOLE),
        arguments=arguments,
    )


def _path(names: bytes, whole: int) -> bytes | None:
    """Join names that come leaf first, each with its NUL."""
    return b"/" + b"/".join(reversed(names.split(b"\0")[:-1])) if whole else None
