"""The unwinding worker gives an answer or dies alone, and holds no rights."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.recorder import unwinder
from tests.recorder.test_core_head import core as make_core
from tests.recorder.test_core_head import prstatus, siginfo
from tests.support.requirements import need_root


@pytest.fixture
def core(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "core", os.O_RDWR | os.O_CREAT, 0o600)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF",
        os.urandom(100_000),
        make_core(prstatus(11, 77) + siginfo(11, 1, 0)),
        make_core(b"\xff" * 4096),
        make_core(prstatus(11, 77), memory=1 << 62),
    ],
    ids=["empty", "magic", "random", "without memory", "bad notes", "lying size"],
)
def test_garbage_is_an_answer(core: int, content: bytes) -> None:
    os.write(core, content)

    trace = unwinder.unwind(core, (), 20)

    assert trace.fault is not None or not any(thread.frames for thread in trace.threads)


def test_worker_s_answer_is_not_believed(core: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, fault in (
        ("print('{\"threads\": 1}')", "the worker's answer has 1 faults"),
        ("import os; os.abort()", "the worker died: SIGABRT"),
        ("while True: print('x' * 1000000)", "not done within 3 s"),
        ("import sys, time; sys.stdin.close(); time.sleep(60)", "not done within 3 s"),
    ):
        monkeypatch.setattr(unwinder, "_COMMAND", (sys.executable, "-c", program))

        assert unwinder.unwind(core, (), 3).fault == fault


def test_worker_cannot_change_the_core(core: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.write(core, b"evidence")
    program = """
import json, os, sys
core = json.load(sys.stdin)["core"]
try:
    os.pwrite(core, b"x", 0)
except OSError as error:
    print(json.dumps({"fault": f"{os.pread(core, 8, 0)} {error.strerror}"}))
"""
    monkeypatch.setattr(unwinder, "_COMMAND", (sys.executable, "-c", program))

    assert unwinder.unwind(core, (), 10).fault == "b'evidence' Bad file descriptor"


def test_no_worker_is_started_without_time(core: int) -> None:
    assert unwinder.unwind(core, (), 0.1).fault == "there was no time for it"


def test_worker_gives_up_all_rights() -> None:
    need_root()
    program = """
import os
from services.recorder.unwind_worker import give_up_rights
give_up_rights(10)
print(os.getresuid(), os.getresgid(), os.getgroups())
status = dict(line.split(":", 1) for line in open("/proc/thread-self/status"))
print(int(status["CapEff"], 16), int(status["CapPrm"], 16), status["NoNewPrivs"].strip())
print(sum(1 for line in open("/proc/net/dev")) - 2)
for act in (os.fork, lambda: os.write(os.memfd_create("x"), b"x"), lambda: os.setuid(0)):
    try:
        act()
        print("could", act)
    except OSError:
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20
    )

    assert done.stdout.splitlines() == [
        "(65534, 65534, 65534) (65534, 65534, 65534) []",
        "0 0 1",
        "1",
        *["refused"] * 3,
    ], done.stderr
