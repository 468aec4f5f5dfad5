"""Why a death left no crash files, as exactly as it can be told afterwards.

The kernel decides on a core in do_coredump(), fs/coredump.c: what it looks at of the process is in
the detector's event, and of some refusals it tells in its log.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from crashbus.messages import SignalEvent
from services.collector import kernel_log

_SYS = Path("/proc/sys")
_DOCTOR = "see with 'crashbus doctor' whether the recorder runs and owns core_pattern"
_FORBIDS = (
    "no setting of the host changes that: see whether the program has an option for it, as what "
    "keeps keys in its memory often has"
)
_OF_ANOTHER_USER = "sysctl fs.suid_dumpable=2, if it runs as another user than who started it"
# "coredump: 12(comm): over core_pipe_limit, skipping core dump" since Linux 6.12; before that
# "Pid 12(comm) over core_pipe_limit" and "Process 12(comm) has RLIMIT_CORE set to 1".
_TOLD = r"(?:coredump: |Pid |Process ){pid}\({comm}\):? (.*)"


@dataclass(frozen=True)
class Host:
    """What a host's settings say of cores.

    Attributes:
        pipes: core_pattern starts a program for each core.
        suid_dumpable: proc_sys_fs(5).
    """

    pipes: bool
    suid_dumpable: str

    @classmethod
    def read(cls) -> "Host":
        """Return what they are now."""
        pattern = _read("kernel/core_pattern")
        return cls(pattern.startswith("|"), _read("fs/suid_dumpable"))


def why(event: SignalEvent) -> tuple[str, str]:
    """Return why nothing was captured, and what would mend it."""
    if event.disposition == "oom_kill":
        return "killed by the OOM killer: the kernel dumps no core for that", "add memory"
    told = said_of(event, kernel_log.lines())
    return explain(event, Host.read(), told)


def explain(event: SignalEvent, host: Host, told: str | None) -> tuple[str, str]:
    """Say why, and what would mend it.

    Args:
        told: what the kernel's log says of this process.
    """
    died = f"{event.process.comm} died of {event.signal_name} and nothing captured it"
    if event.dumpable == 0:
        return f"{died}: the kernel refused a core, for {_forbidden(host)}", _mend_forbidden(host)
    if event.core_limit == 1 and host.pipes:
        return (
            f"{died}: the kernel starts no program for the core of a process whose RLIMIT_CORE is "
            "1",
            "give it another limit than 1 (ulimit -c, LimitCORE=); or let the recorder have cores "
            "through the socket (CRASHBUS_RECORDER_MECHANISM), which knows no limit",
        )
    if told and "core_pipe_limit" in told:
        return (
            f"{died}: the kernel says {told!r}, so more processes crashed at once than "
            "core_pipe_limit allows",
            "let the recorder own core_pattern, which raises that limit, or raise it: sysctl "
            "kernel.core_pipe_limit",
        )
    if told:
        return f"{died}: the kernel says {told!r}", _DOCTOR
    if event.dumpable is None and host.suid_dumpable == "0":
        return died, (
            f"{_DOCTOR}; if the kernel refused a core: {_OF_ANOTHER_USER}; where it called "
            f"prctl(PR_SET_DUMPABLE, 0) itself, {_FORBIDS}"
        )
    return died, _DOCTOR


def _forbidden(host: Host) -> str:
    if host.suid_dumpable != "0":  # else the kernel had set it to that; prctl(2)
        return "the process forbade its own: prctl(PR_SET_DUMPABLE, 0)"
    return (
        "fs.suid_dumpable is 0 and it runs as another user than who started it, or may not be read "
        "by its user; or it forbade its own: prctl(PR_SET_DUMPABLE, 0)"
    )


def _mend_forbidden(host: Host) -> str:
    if host.suid_dumpable != "0":
        return _FORBIDS
    return f"{_OF_ANOTHER_USER}; where it forbade its own, {_FORBIDS}"


def said_of(event: SignalEvent, lines: Iterable[tuple[float, str]]) -> str | None:
    """Return what the kernel's log says of a process's core.

    It names the process as its own PID namespace does.

    Args:
        lines: of the log, each with its time; see `kernel_log.is_near`.
    """
    process, at = event.process, event.monotonic_ns / 1e9
    told = re.compile(_TOLD.format(pid=process.ns_pid, comm=re.escape(process.comm)))
    said = [line for when, line in lines if kernel_log.is_near(when, at)]
    matches = [match for line in said if (match := told.match(line))]
    return matches[-1][1][:200] if matches else None  # an earlier one had the same PID


def _read(name: str) -> str:
    try:
        return (_SYS / name).read_text().strip()
    except OSError:
        return ""
