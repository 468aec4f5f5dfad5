"""Whether a set of crash files is whole: decided from what is seen, without I/O.

Two writers make sets. The recorder leaves a capture record that says it all. AppScope's
library leaves nothing but the files, written in place in a known order, so a set of its is
whole when every file that its own configuration promises is there and the process holds
none of them open any more, or when the process is gone.
"""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from crashbus.layout import Kind
from services.common.capture import CaptureRecord

_APPSCOPE_ORDER = (Kind.INFO, Kind.CFG, Kind.BACKTRACE, Kind.CORE)


class Verdict(Enum):
    """What to do with a set."""

    WAIT = auto()  # its writer still lives and is not done, or another will finish it
    WHOLE = auto()
    CUT_SHORT = auto()  # its writer is gone and was not done


@dataclass(frozen=True)
class RecordState:
    """A capture record as read: None where it could not be.

    Attributes:
        is_left: its recorder was killed, and another will finish the set.
    """

    record: CaptureRecord | None
    being_written: bool
    is_left: bool = False


def judge_recorded(state: RecordState) -> Verdict:
    """Judge a set that the recorder made; see `services.common.capture`."""
    if state.being_written:
        return Verdict.WAIT
    if state.record is not None and state.record.state == "complete":
        return Verdict.WHOLE
    return Verdict.WAIT if state.is_left else Verdict.CUT_SHORT


def judge_appscope(
    present: Set[Kind], held_open: Set[Kind], promised: Set[Kind] | None, process_alive: bool
) -> Verdict:
    """Judge a set that AppScope's library made.

    Args:
        present: the kinds that lie in the directory.
        held_open: those of them that the process has open.
        promised: the kinds that the library's configuration announces; None where the
            configuration is not there yet, or cannot be read.
        process_alive: whether the process can still write.
    """
    expected = {Kind.INFO, Kind.CFG, Kind.BACKTRACE, Kind.CORE} if promised is None else promised
    missing = expected - present
    if process_alive:
        return Verdict.WAIT if missing or held_open else Verdict.WHOLE
    return Verdict.CUT_SHORT if missing else Verdict.WHOLE


def doubtful(present: Set[Kind]) -> Set[Kind]:
    """Return which files of a set may be incomplete when its writer ended too early.

    AppScope's library writes one file after the other, so only the last of them; the
    recorder writes some at a time, and all that it makes late.
    """
    if Kind.SNAPSHOT in present:
        return present
    written = [kind for kind in _APPSCOPE_ORDER if kind in present]
    return set(written[-1:])


def promised_kinds(cfg: bytes) -> Set[Kind] | None:
    """Return what AppScope's configuration (the content of ``cfg_<epoch>``) makes it write.

    The keys are ``libscope.snapshot.coredump`` and ``.backtrace``, "true" or "false" as text.
    """
    snapshot = _at(_json(cfg), "libscope", "snapshot")
    if not isinstance(snapshot, Mapping):
        return None
    promised = {Kind.INFO, Kind.CFG}
    if str(snapshot.get("backtrace")).lower() == "true":
        promised.add(Kind.BACKTRACE)
    if str(snapshot.get("coredump")).lower() == "true":
        promised.add(Kind.CORE)
    return promised


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class Cause:
    """What a backtrace's head says of the signal."""

    signal: int
    fault_address: int | None
    meaning: str | None


def cause_of(backtrace: bytes) -> Cause | None:
    """Read the head of AppScope's backtrace file:
    ``backtrace info: signal 11 errno 0 fault address 0x0, reason of fault:`` and a line of
    words; None where it has another form.
    """
    first, _, rest = backtrace.partition(b"\n")
    words = first.decode("ascii", "replace").split()
    if words[:3] != ["backtrace", "info:", "signal"] or len(words) < 9:
        return None
    try:
        number, address = int(words[3][:3]), int(words[8].rstrip(",")[:18], 16)
    except ValueError:
        return None
    if not 1 <= number <= 64:
        return None
    if not 0 <= address < 1 << 64:
        address = 0
    meaning = rest.partition(b"\n")[0][:200].decode("utf-8", "backslashreplace")
    return Cause(number, address, meaning or None)


def process_name(info: bytes) -> str | None:
    """Return the process's name from AppScope's ``info`` file; None where it has none."""
    for line in info.splitlines():
        key, _, value = line.partition(b": ")
        if key == b"Process name" and value:
            return value[:64].decode("utf-8", "backslashreplace")
    return None
