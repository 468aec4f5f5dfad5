"""The small crash files in AppScope's form, as bytes; ours carry more where that fits.

AppScope's cli/snapshot/snapshot.go gives the keys of ``snapshot``, samples of its library's
files the rest. What a crashed process wrote (its names, its symbols) stays on its line.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from crashbus import signals
from crashbus.identity import boot_id
from crashbus.parts import Container, Process
from services.common import resources
from services.recorder.core.core_head import Cause
from services.recorder.facts import Facts
from services.recorder.unwinding.backtrace import (
    Backtrace,
    Frame,
    Instruction,
    LoadedModule,
    Thread,
)
from services.recorder.unwinding.fingerprint import frames

_REGISTERS_IN_A_LINE = 4
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def one_line(text: str) -> str:
    """Return text without line breaks and control characters: they show as ``\\xNN``."""
    return text.translate(_CONTROLS)


def info(version: str, epoch: int, pid: int, comm: str) -> bytes:
    """Return the content of ``info``: four lines, the last without its end."""
    return (
        f"Scope Version: crashbus {version}\n"
        f"Unix Time: {epoch} sec\n"
        f"PID: {pid}\n"
        f"Process name: {one_line(comm)}"
    ).encode()


def cfg(settings: Mapping[str, Any]) -> bytes:
    """Return the content of ``cfg``: one line of JSON."""
    return json.dumps(settings, separators=(",", ":"), default=str).encode()


def backtrace(
    cause: Cause,
    trace: Backtrace,
    thread_names: Mapping[int, str],
    registers: Mapping[str, int] | None = None,
) -> bytes:
    """Return the content of ``backtrace``.

    The crashing thread comes first and looks as from AppScope; what it was at follows
    ``--- instruction``, its registers ``--- registers``, each other thread
    ``--- thread <tid> <name>``. Behind ``symbol + offset`` there may stand, each after two
    spaces, ``as <name>`` of what is mangled, ``inlined``, ``at <file>:<line>`` and
    ``in <module> (<build ID>)``.
    """
    lines = [
        f"backtrace info: signal {cause.signal} errno {cause.errno} fault address "
        f"{cause.fault_address or 0:#x}, reason of fault:",
        _reason(cause),
        "--- backtrace",
    ]
    if trace.fault:
        lines.append(f"backtrace failed: {one_line(trace.fault)}")
    for position, thread in enumerate(trace.threads):
        if position:
            name = one_line(thread_names.get(thread.tid, ""))
            lines.append(f"--- thread {thread.tid} {name}".rstrip())
        lines.extend(_stack(thread, trace.modules))
        if not position:
            lines.extend(_state(trace.instruction, registers or {}))
    if not trace.threads:
        lines.extend(_state(trace.instruction, registers or {}))
    return ("\n".join(lines) + "\n").encode()


def _state(instruction: Instruction | None, registers: Mapping[str, int]) -> Iterator[str]:
    if instruction is not None:
        yield "--- instruction"
        yield f"{instruction.address:#x}: {_assembly(instruction)}"
        for touched in instruction.touched:
            size = f" {touched.size} bytes" if touched.size else ""
            yield f"{touched.access}{size} at {touched.address:#x}"
    if registers:
        yield "--- registers"
    pairs = [f"{name} {value:#x}" for name, value in registers.items()]
    for start in range(0, len(pairs), _REGISTERS_IN_A_LINE):
        yield "  ".join(pairs[start : start + _REGISTERS_IN_A_LINE])


def _assembly(instruction: Instruction) -> str:
    if not instruction.code:
        return "there is no code: a jump or return to a wrong address"
    return f"{one_line(instruction.text or 'no instruction')}  ({instruction.code})"


def _reason(cause: Cause) -> str:
    if not cause.signal:
        return "Snapshot of a living process"
    if cause.code is None:
        return "Unknown Error"
    meaning = signals.code_meaning(cause.signal, cause.code)
    sender = f" (PID {cause.sender_pid}, UID {cause.sender_uid})" if cause.sender_pid else ""
    return meaning[0].upper() + meaning[1:] + sender


def _stack(thread: Thread, modules: tuple[LoadedModule, ...]) -> Iterator[str]:
    for number, frame in enumerate(thread.frames):
        yield one_line(f"#{number} {frame.pc:#x} {_place(frame, modules)}")
    if thread.python:
        yield "--- python"
    for number, python in enumerate(thread.python):
        line = "" if python.line is None else f":{python.line}"
        yield one_line(f"#{number} {python.function}  at {python.file}{line}")
    if thread.fault:
        yield f"incomplete: {one_line(thread.fault)}"


def _place(frame: Frame, modules: tuple[LoadedModule, ...]) -> str:
    parts = ["?"]
    if frame.symbol is not None:
        parts = [frame.symbol if frame.offset is None else f"{frame.symbol} + {frame.offset}"]
    if frame.readable:
        parts.append(f"as {frame.readable}")
    if frame.inlined:
        parts.append("inlined")
    if frame.source:
        parts.append(f"at {frame.source}")
    if frame.module is not None and frame.module < len(modules):
        module = modules[frame.module]
        parts.append(f"in {module.path}" + (f" ({module.build_id})" if module.build_id else ""))
    return "  ".join(parts)


def snapshot(
    *,
    version: str,
    crash_id: str,
    crashed_at: float,
    host: str,
    facts: Facts,
    cause: Cause,
    tid: int | None,
    fault: str | None,
    trace: Backtrace,
    fingerprint: str | None,
    held_for: float | None,
    core_size: int,
) -> bytes:
    """Return the content of ``snapshot``: indented JSON, AppScope's keys first."""
    content = {
        **_as_appscope(version, crashed_at, host, facts, cause),
        "CrashId": crash_id,
        **_signal(cause, fault),
        "Fingerprint": fingerprint,
        "FingerprintFrames": frames(trace.calls()),
        **_process(facts, tid),
        "HoldMilliseconds": None if held_for is None else round(held_for * 1000, 3),
        "CoreSize": core_size,
        "Modules": _modules(facts, trace),
        **resources.describe(facts.resources),
        "Notes": facts.notes,
    }
    return json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _as_appscope(
    version: str, crashed_at: float, host: str, facts: Facts, cause: Cause
) -> dict[str, Any]:
    process, kernel = facts.process, platform.uname()
    return {
        "Time": datetime.fromtimestamp(crashed_at, UTC).isoformat().replace("+00:00", "Z"),
        "Version": f"crashbus {version}",
        "Username": facts.username,
        "Environment": facts.environment,
        "Arch": kernel.machine,
        "Kernel": kernel.release,
        "SignalNumber": cause.signal,
        # The kernel has reset the action to the default by the time it dumps.
        "SignalHandler": "0x0",
        "Errno": cause.errno,
        "ProcessName": process.comm,
        "ProcessArgs": " ".join(process.command_line),
        "Pid": process.pid,
        "Uid": process.uid,
        "Gid": process.gid,
        "Hostname": host,
    }


def _signal(cause: Cause, fault: str | None) -> dict[str, Any]:
    return {
        "SignalName": signals.name(cause.signal),
        "Code": cause.code,
        "CodeMeaning": _meaning(cause),
        "FaultAddress": None if cause.fault_address is None else f"{cause.fault_address:#x}",
        "FaultMapping": fault,
        "SenderPid": cause.sender_pid,
        "SenderUid": cause.sender_uid,
    }


def _process(facts: Facts, tid: int | None) -> dict[str, Any]:
    process = facts.process
    return {
        "NsPid": process.ns_pid,
        "NsTid": tid,
        "Executable": process.executable,
        "Arguments": process.command_line,
        "Cwd": facts.cwd,
        "Root": facts.root,
        "Cgroup": process.cgroup,
        "Container": _container(process.container),
        "StartTime": _start_time(process),
        "Limits": facts.limits,
        "Threads": [
            {"Tid": thread.tid, "NsTid": thread.ns_tid, "Name": thread.name}
            for thread in facts.threads
        ],
    }


def _meaning(cause: Cause) -> str | None:
    return None if cause.code is None else signals.code_meaning(cause.signal, cause.code)


def _container(container: Container | None) -> dict[str, Any] | None:
    if container is None:
        return None
    return {
        "Id": container.id,
        "Runtime": container.runtime,
        "Name": container.name,
        "Image": container.image,
        "Labels": container.labels,
    }


def _start_time(process: Process) -> str | None:
    """Return when the process started, from clock ticks since boot, proc_pid_stat(5); None where
    that was another boot.
    """
    if process.boot_id != boot_id():
        return None
    with open("/proc/uptime") as file:  # noqa: PTH123
        uptime = float(file.read().split()[0])
    age = uptime - process.start_ticks / os.sysconf("SC_CLK_TCK")
    started = datetime.fromtimestamp(max(0.0, time.time() - age), UTC)
    return started.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _modules(facts: Facts, trace: Backtrace) -> list[dict[str, str | None]]:
    """List the mapped files; build IDs come from the core, where the unwinder read them."""
    build_ids = {module.path: module.build_id for module in trace.modules}
    return [
        {
            "Path": module.path,
            "Start": f"{module.start:#x}",
            "End": f"{module.end:#x}",
            "BuildId": build_ids.get(module.path),
        }
        for module in facts.modules
    ]
