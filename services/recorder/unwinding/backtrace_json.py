"""``backtrace_<epoch>.json``: the backtrace for programs, as ``backtrace`` is for people.

Addresses and registers are hexadecimal text, because many readers of JSON take numbers for
doubles.
"""

import json
from collections.abc import Mapping
from typing import Any

from crashbus import signals
from services.recorder.core.core_head import Cause
from services.recorder.unwinding.backtrace import Backtrace, Frame, Instruction, Thread
from services.recorder.unwinding.fingerprint import frames


def content(
    *,
    crash_id: str,
    cause: Cause,
    fault: str | None,
    trace: Backtrace,
    fingerprint: str | None,
    thread_names: Mapping[int, str],
    registers: Mapping[str, int],
) -> bytes:
    """Return the file's content: one line.

    Args:
        fault: what the fault address was, in words.
        thread_names: by the thread IDs of the core.
        registers: of the crashing thread.
    """
    document = {
        "crash_id": crash_id,
        "signal": _signal(cause, fault),
        "fingerprint": fingerprint,
        "fingerprint_frames": frames(trace.calls()),
        "fault": trace.fault,
        "instruction": trace.instruction and _instruction(trace.instruction),
        "registers": {name: f"{value:#x}" for name, value in registers.items()},
        "threads": [
            _thread(thread, thread_names.get(thread.tid), number == 0)
            for number, thread in enumerate(trace.threads)
        ],
        "modules": [
            {
                "path": module.path,
                "start": f"{module.start:#x}",
                "end": f"{module.end:#x}",
                "build_id": module.build_id,
            }
            for module in trace.modules
        ],
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def _signal(cause: Cause, fault: str | None) -> dict[str, Any]:
    return {
        "number": cause.signal,
        "name": signals.name(cause.signal),
        "code": cause.code,
        "meaning": None if cause.code is None else signals.code_meaning(cause.signal, cause.code),
        "errno": cause.errno,
        "fault_address": None if cause.fault_address is None else f"{cause.fault_address:#x}",
        "fault_mapping": fault,
        "sender_pid": cause.sender_pid,
        "sender_uid": cause.sender_uid,
    }


def _instruction(one: Instruction) -> dict[str, Any]:
    touched = [
        {"access": part.access, "address": f"{part.address:#x}", "size": part.size}
        for part in one.touched
    ]
    return {
        "address": f"{one.address:#x}",
        "code": one.code,
        "text": one.text,
        "touched": touched,
    }


def _thread(thread: Thread, name: str | None, crashed: bool) -> dict[str, Any]:
    return {
        "tid": thread.tid,
        "name": name,
        "crashed": crashed,
        "frames": [_frame(frame) for frame in thread.frames],
        "python": [
            {"function": one.function, "file": one.file, "line": one.line} for one in thread.python
        ],
        "incomplete": thread.fault,
    }


def _frame(frame: Frame) -> dict[str, Any]:
    file, _, line = (frame.source or "").rpartition(":")
    return {
        "pc": f"{frame.pc:#x}",
        "symbol": frame.symbol,
        "readable": frame.readable,
        "offset": frame.offset,
        "file": file or None,
        "line": int(line) if line.isdecimal() else None,
        "inlined": frame.inlined,
        "module": frame.module,
    }
