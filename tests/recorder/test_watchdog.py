"""What the watchdog does when the recorder is stopped, killed, or loses it."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.recorder.conftest import MakeRecorder
from tests.support import core_pattern
from tests.support.crashers import crasher
from tests.support.recorder import crash
from tests.support.wait import until


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_stopped_recorder_holds_nobody_beyond_its_deadline(
    recorder_with: MakeRecorder, mechanism: str
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with(recorder_mechanism=mechanism, recorder_watchdog_deadline=3)
    await recorder.start()
    assert recorder.process is not None
    os.kill(recorder.pid, signal.SIGSTOP)
    process = subprocess.Popen([crasher("null_pointer")])

    status = await asyncio.to_thread(process.wait, 20)

    assert status == -signal.SIGSEGV
    assert recorder.process.wait(5) == -signal.SIGKILL
    await until(lambda: "core_pattern" in recorder.log.partition("killed a recorder that")[2])
    if mechanism == "pipe":
        assert "core_pattern stays: the pipe helper keeps crashes" in recorder.log
    else:
        assert core_pattern.current() == "/somewhere/core.%p"
    await recorder.start()
    pid, _ = crash(crasher("null_pointer"))
    assert (await recorder.captured(pid)).state == "complete"


async def test_core_pattern_is_put_back_after_sigkill(recorder_with: MakeRecorder) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with()
    await recorder.start()

    recorder.kill()

    await until(lambda: core_pattern.current() == "/somewhere/core.%p")
    await until(lambda: "core_pattern put back" in recorder.log)


async def test_recorder_that_took_over_is_left_alone(recorder_with: MakeRecorder) -> None:
    first = recorder_with()
    await first.start()
    watchdog = first.watchdog()
    assert watchdog is not None
    os.kill(watchdog, signal.SIGSTOP)
    first.kill()
    second = recorder_with(state=first.state)
    await second.start()
    taken = core_pattern.current()

    os.kill(watchdog, signal.SIGCONT)
    await until(lambda: "core_pattern stays as it is" in first.log)

    assert core_pattern.current() == taken
    pid, _ = crash(crasher("null_pointer"))
    assert (await second.captured(pid)).state == "complete"


async def test_recorder_at_work_is_left_alone(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with(recorder_watchdog_deadline=3)
    await recorder.start()
    assert recorder.process is not None

    with pytest.raises(subprocess.TimeoutExpired):
        await asyncio.to_thread(recorder.process.wait, 5)


async def test_killed_watchdog_is_replaced(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with()
    await recorder.start()
    former = recorder.watchdog()
    assert former is not None

    os.kill(former, signal.SIGKILL)

    await until(lambda: recorder.watchdog() not in (None, former))
    assert "the watchdog is gone, starting another" in recorder.log


async def test_watchdog_ends_with_its_recorder(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with()
    await recorder.start()
    watchdog = recorder.watchdog()

    assert recorder.stop() == 0

    assert not Path(f"/proc/{watchdog}").exists()
