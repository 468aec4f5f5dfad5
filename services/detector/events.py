"""From what the kernel saw to what is published: decisions only, no I/O."""

import hashlib
import mmap
import time
from dataclasses import dataclass

from crashbus import identity, names, signals
from crashbus.messages import SignalEvent
from crashbus.parts import Handler, Oom, Process, Sender
from services.common.process import container_of, split_arguments
from services.detector.record import Kind, Record

_PAGE_KIB = mmap.PAGESIZE // 1024
MAX_COMMAND_LINE = 32 * 1024  # characters; a message must fit the bus whatever was passed


@dataclass(frozen=True)
class Clock:
    """Turns CLOCK_MONOTONIC into wall-clock time, as both stand now."""

    ahead: float  # seconds of the wall clock before the monotonic one

    @classmethod
    def now(cls) -> "Clock":
        return cls((time.time_ns() - time.monotonic_ns()) / 1e9)

    def wall(self, monotonic_ns: int) -> float:
        """Return Unix seconds."""
        return self.ahead + monotonic_ns / 1e9


def process_of(record: Record, boot_id: str) -> Process:
    """Return the process as far as the kernel showed it."""
    groups = [group for group in (record.cgroup, record.cgroup_v1) if group is not None]
    cgroup = names.text(max(groups, key=len)) if groups else None
    return Process(
        boot_id=boot_id,
        pid=record.pid,
        ns_pid=record.ns_pid,
        start_ticks=record.start_ticks,
        uid=record.uid,
        gid=record.gid,
        comm=names.text(record.comm),
        executable=names.text(record.executable) if record.executable is not None else None,
        command_line=split_arguments(record.arguments, is_cut=not record.arguments_whole),
        cgroup=cgroup,
        container=container_of(cgroup),
    )


def is_whole(record: Record) -> bool:
    """Tell whether /proc could add nothing to what the kernel showed."""
    return (
        record.start_boottime > 0
        and record.arguments_whole
        and record.executable is not None
        and record.cgroup is not None
    )


def joined(kernel: Process, proc: Process, record: Record) -> Process:
    """Return the process as the kernel showed it, with what only /proc could tell.

    `proc` must be the same process.
    """
    if not record.start_boottime:
        return proc
    more: dict[str, object] = {}
    if not record.arguments_whole and proc.command_line:
        more["command_line"] = proc.command_line
    if kernel.executable is None:
        more["executable"] = proc.executable
    if record.cgroup is None:
        more |= {"cgroup": proc.cgroup, "container": proc.container}
    return kernel.model_copy(update=more)


def shortened(process: Process, room: int) -> Process:
    """Return the process with a command line of at most `room` characters."""
    kept = []
    for argument in process.command_line:
        if room <= 0:
            break
        kept.append(argument[:room])
        room -= len(kept[-1]) + 1
    return process.model_copy(update={"command_line": tuple(kept)})


def signal_event(
    record: Record, process: Process, host: str, clock: Clock, in_appscope: bool
) -> SignalEvent:
    """Return the event to publish.

    Args:
        in_appscope: the handler lies in AppScope's library.
    """
    crash_id = identity.crash_id(process.boot_id, process.pid, process.start_ticks)
    return SignalEvent(
        host=host,
        time=clock.wall(record.monotonic_ns),
        crash_id=crash_id,
        event_id=_event_id(crash_id, record),
        monotonic_ns=record.monotonic_ns,
        process=shortened(process, MAX_COMMAND_LINE),
        tid=record.tid,
        signal=record.signal,
        signal_name=signals.name(record.signal),
        code=record.code,
        code_meaning=signals.code_meaning(record.signal, record.code),
        errno=record.error,
        fault_address=(
            record.detail if signals.has_fault_address(record.signal, record.code) else None
        ),
        sender=_sender(record) if record.kind is Kind.SIGNAL else None,
        disposition=_disposition(record),
        handler=(
            Handler(address=record.handler, flags=record.handler_flags, appscope=in_appscope)
            if record.handler
            else None
        ),
        dumpable=record.dumpable if record.dumpable >= 0 else None,
        core_limit=record.core_limit if record.dumpable >= 0 else None,
        oom=_oom(record) if record.kind is Kind.OOM_KILL else None,
    )


def _event_id(crash_id: str, record: Record) -> str:
    named = f"{crash_id}:{record.tid}:{record.monotonic_ns}:{record.signal}:{record.kind}"
    return hashlib.sha256(named.encode()).hexdigest()[:20]


def _disposition(record: Record) -> str:
    if record.kind is Kind.OOM_KILL:
        return "oom_kill"
    return "handled" if record.handler else "default"


def _sender(record: Record) -> Sender | None:
    """Return who sent it, in the namespaces of the receiver: a process outside of its PID
    namespace shows as PID 0 (pid_namespaces(7)), a user outside of its user namespace as the
    overflow UID (user_namespaces(7)).
    """
    if not signals.has_sender(record.code):
        return None
    pid, uid = record.detail & 0xFFFFFFFF, record.detail >> 32
    return Sender(pid=pid, uid=uid)


def _oom(record: Record) -> Oom:
    known = record.total_vm >= 0

    def kib(pages: int) -> int | None:
        # Counters of the kernel that are not exact can be below 0 for a moment.
        return max(pages, 0) * _PAGE_KIB if known else None

    return Oom(
        total_vm_kib=kib(record.total_vm),
        anon_rss_kib=kib(record.anon_rss),
        file_rss_kib=kib(record.file_rss),
        shmem_rss_kib=kib(record.shmem_rss),
        oom_score_adj=record.oom_score_adj if known else None,
    )
