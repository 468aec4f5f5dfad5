"""What the guard does beside a recorder in a container, whose watchdog ends together with it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recorder.conftest import MakeRecorder
from tests.support import core_pattern
from tests.support.recorder import RecorderService
from tests.support.wait import until

BEFORE = "/somewhere/core.%p"


class Guard:
    """``python -m services.recorder.guard`` for one recorder."""

    def __init__(self, recorder: RecorderService) -> None:
        environment = os.environ | {
            "CRASHBUS_STATE": str(recorder.state),
            "CRASHBUS_RECORDER_SOCKET": str(recorder.state.with_name("run") / "s"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.recorder.guard"], env=environment
        )

    async def ready(self) -> None:
        """Wait until it has a handler for SIGTERM; proc_pid_status(5)."""
        status = Path(f"/proc/{self.process.pid}/status")
        mask = 1 << (signal.SIGTERM - 1)
        await until(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) & mask)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def guards() -> Iterator[list[Guard]]:
    started: list[Guard] = []
    yield started
    for guard in started:
        guard.process.kill()
        guard.process.wait(60)


def kill_with_its_watchdogs(recorder: RecorderService) -> None:
    """As a container's end does."""
    watchdogs = recorder.watchdogs()
    for watchdog in watchdogs:
        os.kill(watchdog, signal.SIGSTOP)  # none notices that another is gone
    recorder.kill()
    for watchdog in watchdogs:
        os.kill(watchdog, signal.SIGKILL)


async def test_guard_puts_back_what_a_killed_recorder_has_left(
    recorder_with: MakeRecorder, guards: list[Guard]
) -> None:
    core_pattern.set_pattern(BEFORE)
    recorder = recorder_with(recorder_mechanism="socket")
    await recorder.start()
    guards.append(Guard(recorder))
    await guards[0].ready()

    kill_with_its_watchdogs(recorder)

    await until(lambda: core_pattern.current() == BEFORE)


async def test_guard_that_is_stopped_last_leaves_no_helper_in_force(
    recorder_with: MakeRecorder, guards: list[Guard]
) -> None:
    """Until then the helper stays, and keeps crashes for the next recorder."""
    core_pattern.set_pattern(BEFORE)
    recorder = recorder_with(recorder_mechanism="pipe")
    await recorder.start()
    kill_with_its_watchdogs(recorder)
    guards.append(Guard(recorder))
    await guards[0].ready()
    assert core_pattern.current().startswith("|")

    assert guards[0].stop() == 0

    assert core_pattern.current() == BEFORE
    assert not (recorder.state.with_name("run") / "s").exists()


async def test_guard_leaves_a_recorder_that_runs_alone(
    recorder_with: MakeRecorder, guards: list[Guard]
) -> None:
    core_pattern.set_pattern(BEFORE)
    recorder = recorder_with(recorder_mechanism="socket")
    await recorder.start()
    guards.append(Guard(recorder))
    await guards[0].ready()

    assert guards[0].stop() == 0

    assert core_pattern.current().startswith("@")
    assert (recorder.state.with_name("run") / "s").exists()
