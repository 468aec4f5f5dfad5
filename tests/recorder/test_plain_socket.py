"""The coredump socket of Linux 6.16, without a request: newer kernels have it as well."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.recorder.conftest import MakeRecorder
from tests.recorder.test_capture import frames, gdb
from tests.support import core_pattern
from tests.support.crashers import HOG, crasher
from tests.support.recorder import FILES, crash
from tests.support.requirements import need_linux

_AS_ON_6_16 = """
import runpy, sys
from services.recorder.handover import mechanism
mechanism.choose = lambda *_: mechanism.Mechanism.SOCKET
sys.argv = ["recorder"]
runpy.run_module("services.recorder", run_name="__main__")
"""


async def test_crashes_by_the_plain_socket_are_captured_whole(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    need_linux((6, 16), "the coredump socket")
    recorder = recorder_with()
    recorder.prefix = (sys.executable, "-c", _AS_ON_6_16)
    await recorder.start()
    pattern = core_pattern.current()
    assert pattern.startswith("@/") and "coredump socket" in recorder.log

    small, number = crash(crasher("threads"), cwd=tmp_path)
    assert number == signal.SIGSEGV
    large = subprocess.Popen([*HOG, "100"], stderr=subprocess.DEVNULL)
    assert large.wait(60) == -signal.SIGSEGV

    for pid in (small, large.pid):
        record = await recorder.captured(pid)
        assert len(record.files) == len(FILES)
        assert not any(file.truncated for file in record.files.values())
        assert record.signal_name == "SIGSEGV"
    assert frames(recorder.file(small, "backtrace").read_text())[0][2] == "crash_here"
    assert "crash_here" in gdb(crasher("threads"), recorder.file(small, "core"), "bt")
    shown = json.loads(recorder.file(small, "snapshot").read_bytes())
    assert shown["Cwd"] == str(tmp_path) and shown["Threads"] and shown["OpenFiles"]
    assert recorder.file(large.pid, "core").stat().st_size > 100 << 20


async def test_many_crashes_by_the_plain_socket_lose_none(recorder_with: MakeRecorder) -> None:
    need_linux((6, 16), "the coredump socket")
    recorder = recorder_with(recorder_backtrace_deadline=0.1)
    recorder.prefix = (sys.executable, "-c", _AS_ON_6_16)
    await recorder.start()
    processes = [subprocess.Popen([crasher("null_pointer")]) for _ in range(30)]
    for process in processes:
        assert process.wait(60) == -signal.SIGSEGV
    for process in processes:
        assert len((await recorder.captured(process.pid)).files) == len(FILES)
