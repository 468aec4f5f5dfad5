"""The small files have AppScope's form, whatever a crashed process is called."""

import json

from crashbus.parts import Process
from services.recorder import crash_files
from services.recorder.core.core_head import Cause
from services.recorder.facts import Facts
from services.recorder.modules import Module
from services.recorder.unwinding.backtrace import Backtrace, Frame, LoadedModule, Thread

FAULT = Cause(11, 1, 0, fault_address=0xDEADBEEF)


def test_backtrace_begins_as_appscope_s() -> None:
    trace = Backtrace(
        threads=(
            Thread(
                tid=7,
                frames=(
                    Frame(pc=0x55, symbol="level3", offset=12),
                    Frame(pc=0x66),
                    Frame(pc=0x77, symbol="main", offset=9, source="a.c:3", module=0),
                    Frame(pc=0x78, symbol="fold", offset=10, inlined=True, module=1),
                ),
            ),
            Thread(tid=8, frames=(Frame(pc=0x88, symbol="wait", offset=1),), fault="no memory"),
        ),
        modules=(
            LoadedModule(path="/bin/x", start=0, end=1, build_id="ab12"),
            LoadedModule(path="/lib/y", start=2, end=3),
        ),
    )

    text = crash_files.backtrace(FAULT, trace, {8: "worker\n1"}).decode()

    assert text.splitlines() == [
        "backtrace info: signal 11 errno 0 fault address 0xdeadbeef, reason of fault:",
        "Address not mapped to object",
        "--- backtrace",
        "#0 0x55 level3 + 12",
        "#1 0x66 ?",
        "#2 0x77 main + 9  at a.c:3  in /bin/x (ab12)",
        "#3 0x78 fold + 10  inlined  in /lib/y",
        "--- thread 8 worker\\x0a1",
        "#0 0x88 wait + 1",
        "incomplete: no memory",
    ]


def test_backtrace_that_failed_says_why() -> None:
    text = crash_files.backtrace(Cause(6, -6, 0, None, 42, 1000), Backtrace(fault="a\nb"), {})

    assert text.decode().splitlines()[1:] == [
        "Sent by a process to one thread (PID 42, UID 1000)",
        "--- backtrace",
        "backtrace failed: a\\x0ab",
    ]


def test_name_of_a_symbol_cannot_make_a_line() -> None:
    trace = Backtrace(threads=(Thread(tid=1, frames=(Frame(pc=1, symbol="f\n#1 0x2 g"),)),))

    lines = crash_files.backtrace(FAULT, trace, {}).decode().splitlines()

    assert lines[3:] == ["#0 0x1 f\\x0a#1 0x2 g"]


def test_info_has_no_end_of_its_last_line() -> None:
    assert crash_files.info("1.2", 17, 42, "evil\u2028\x1b[2J") == (
        b"Scope Version: crashbus 1.2\nUnix Time: 17 sec\nPID: 42\n"
        b"Process name: evil\\u2028\\x1b[2J"
    )


def test_snapshot_of_a_process_of_which_little_is_known() -> None:
    process = Process(boot_id="b", pid=42, ns_pid=1, start_ticks=1, uid=0, gid=0, comm="x")
    facts = Facts(process, "root", b"", None, None, {}, (), (Module("/bin/x", 16, 32),))

    raw = crash_files.snapshot(
        version="1", crash_id="c", crashed_at=0.5, host="h", facts=facts, cause=Cause(0),
        tid=None, trace=Backtrace(fault="none"), held_for=None, core_size=0,
        fingerprint=None, fault=None,
    )  # fmt: skip

    snapshot = json.loads(raw)
    assert raw.startswith(b'{\n  "Time": "1970-01-01T00:00:00.500000Z",\n')
    assert snapshot["Modules"] == [
        {"Path": "/bin/x", "Start": "0x10", "End": "0x20", "BuildId": None}
    ]
    assert snapshot["FaultAddress"] is None
