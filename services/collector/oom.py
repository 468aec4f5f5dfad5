"""OOM kills: the kernel dumps no core for them, so what can still be read is the bundle.

The victim is looked at as soon as the detector's event comes, which is often before it is gone;
what the kernel said of its choice stays in its log, the limits stay with the cgroup.
"""

import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crashbus import layout, names
from crashbus.layout import Kind
from crashbus.messages import SignalEvent
from crashbus.parts import Oom
from services.collector import processes
from services.collector.kernel_log import is_near, lines
from services.collector.records import record_of
from services.common import capture, crash_directory, redact, resources
from services.common.capture import CapturedFile
from services.common.resources import Resources

_LINES = 400  # of the kernel's log kept: it may list every process of the host
# oom_kill_process() and dump_oom_victim(), mm/oom_kill.c
_CONSTRAINT = re.compile(r"oom-kill:(constraint=\S+)")
_CHOSEN = re.compile(r"oom-kill:constraint=.*,pid=(\d+),uid=\d+$")
_GROUP = re.compile(r"Tasks in (.+) are going to be killed due to memory\.oom\.group set")
_NUMBERS = re.compile(
    r"total-vm:(?P<total_vm_kib>\d+)kB, anon-rss:(?P<anon_rss_kib>\d+)kB, "
    r"file-rss:(?P<file_rss_kib>\d+)kB, shmem-rss:(?P<shmem_rss_kib>\d+)kB, .*"
    r" oom_score_adj:(?P<oom_score_adj>-?\d+)$"
)
_BEGIN = "invoked oom-killer"
# From the beginning of a line: anybody may name a process or a cgroup like the rest of it.
_END = re.compile(r"(?:Out of memory|Memory cgroup out of memory)[^:]*: [Kk]illed process (\d+) ")


@dataclass(frozen=True)
class Seen:
    """What was found of one OOM kill.

    Attributes:
        kernel_log: the lines about it, from "invoked oom-killer" on.
    """

    event: SignalEvent
    resources: Resources
    kernel_log: tuple[str, ...]


def look(event: SignalEvent) -> Seen:
    """Read what is there now; what is gone already is left out."""
    process = event.process
    is_there = processes.is_alive(process.pid, process.start_ticks)
    found = resources.read(process.pid, process.cgroup)
    if not is_there:  # its PID may be another's by now
        found = Resources(cgroup=found.cgroup)
    log = kernel_log(process.pid, process.cgroup, event.monotonic_ns / 1e9)
    return Seen(event, found, log)


def kernel_log(pid: int, cgroup: str | None, at: float) -> tuple[str, ...]:
    """Return what the kernel's log says about one kill.

    Args:
        at: seconds of CLOCK_MONOTONIC at which it was chosen.
    """
    kept: list[str] = []
    told: list[str] = []
    for when, line in lines():
        if not is_near(when, at):
            continue
        if _BEGIN in line:
            kept.clear()
        kept.append(line)
        match = _END.match(line)
        if match and int(match[1]) == pid:
            # Of kills that follow fast upon each other the kernel tells the end alone.
            told = kept[:] if _is_about(pid, cgroup, kept) else [line]
    return tuple(told[: _LINES // 2] + told[-_LINES // 2 :] if len(told) > _LINES else told)


def _is_about(pid: int, cgroup: str | None, report: Iterable[str]) -> bool:
    """Tell whether a report, from its beginning on, is of this kill and not of one before."""
    for line in report:
        chosen, group = _CHOSEN.search(line), _GROUP.search(line)
        if chosen and int(chosen[1]) == pid:
            return True
        # With memory.oom.group, cgroup-v2.rst, all that are in there go with the one.
        if group and f"{cgroup}/".startswith(f"{group[1].rstrip('/')}/"):
            return True
    return False


def write(seen: Seen, root: Path) -> None:
    """Write the bundle to the spool, under a capture record; the process must be gone.

    Raises:
        OSError: there is no room.
        SpoolUnusable: the spool cannot be had.
    """
    event = seen.event
    directory, epoch = crash_directory.open_crash(root, event.process.pid, int(event.time))
    try:
        descriptor = capture.create(directory, epoch, record_of(event, "writing", {}, why(seen)))
        try:
            contents = {Kind.INFO: _info(event, epoch), Kind.SNAPSHOT: _snapshot(seen)}
            captured = {
                layout.crash_file_name(kind, epoch): _write(directory, kind, epoch, content)
                for kind, content in contents.items()
            }
            capture.write(descriptor, record_of(event, "complete", captured, why(seen)))
        finally:
            os.close(descriptor)
    finally:
        os.close(directory)


def _write(directory: int, kind: Kind, epoch: int, content: bytes) -> CapturedFile:
    with os.fdopen(crash_directory.create_file(directory, kind, epoch), "wb") as file:
        file.write(content)
    return CapturedFile(size=len(content))


def why(seen: Seen) -> str:
    """Say in words that and why the kernel chose this process."""
    text = "killed by the OOM killer, for which the kernel dumps no core"
    match = _CONSTRAINT.search("\n".join(seen.kernel_log))
    return f"{text}: {redact.text(match[1])[:1000]}" if match else text


def chosen(seen: Seen) -> Oom | None:
    """Return the kernel's numbers; before Linux 6.9 most tell them in their log alone."""
    told = seen.event.oom
    if told is None or told.total_vm_kib is not None or not seen.kernel_log:
        return told
    match = _NUMBERS.search(seen.kernel_log[-1])
    return Oom.model_validate({k: int(v) for k, v in match.groupdict().items()}) if match else told


def _info(event: SignalEvent, epoch: int) -> bytes:
    name = names.printable(event.process.comm)
    pid = event.process.pid
    return f"Unix Time: {epoch} sec\nPID: {pid}\nProcess name: {name}".encode()


def _snapshot(seen: Seen) -> bytes:
    """Return ``snapshot``: the keys of the recorder's, as far as they can be told."""
    event, kernel, numbers = seen.event, platform.uname(), chosen(seen)
    process = event.process
    content: dict[str, Any] = {
        "Time": datetime.fromtimestamp(event.time, UTC).isoformat().replace("+00:00", "Z"),
        "Arch": kernel.machine,
        "Kernel": kernel.release,
        "SignalNumber": event.signal,
        "ProcessName": process.comm,
        "ProcessArgs": " ".join(process.command_line),
        "Pid": process.pid,
        "Uid": process.uid,
        "Gid": process.gid,
        "Hostname": event.host,
        "CrashId": event.crash_id,
        "SignalName": event.signal_name,
        "Oom": {
            "Chosen": numbers.model_dump() if numbers else None,
            "Why": why(seen),
            "KernelLog": [redact.text(line) for line in seen.kernel_log],
        },
        "NsPid": process.ns_pid,
        "Executable": process.executable,
        "Arguments": process.command_line,
        "Cgroup": process.cgroup,
        "Container": process.container
        and {
            "Id": process.container.id,
            "Runtime": process.container.runtime,
        },
        **resources.describe(seen.resources),
    }
    return json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
