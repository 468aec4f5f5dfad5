"""What the guard does beside a recorder in a container, whose watchdog ends together with it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.recorder import pattern_file, watchdog
from services.recorder.guard import LOOK_EVERY, patience
from services.recorder.paused import HELPER_WITHIN, SILENT_AFTER, Paused
from tests.recorder.conftest import MakeRecorder
from tests.support import core_pattern
from tests.support.crashers import crasher
from tests.support.recorder import RecorderService, crash
from tests.support.wait import stop, until

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
    all_of_them: list[Guard] = []
    yield all_of_them
    for guard in all_of_them:
        guard.process.kill()
        guard.process.wait(60)


async def started(
    recorder_with: MakeRecorder, mechanism: str, **settings: object
) -> RecorderService:
    """Start a recorder after who has core_pattern `BEFORE`."""
    core_pattern.set_pattern(BEFORE)
    recorder = recorder_with(recorder_mechanism=mechanism, **settings)
    await recorder.start()
    return recorder


async def guarding(guards: list[Guard], recorder: RecorderService) -> Guard:
    """Start a guard for a recorder."""
    guards.append(Guard(recorder))
    await guards[-1].ready()
    return guards[-1]


async def test_guard_puts_back_what_a_killed_recorder_without_a_helper_has_left(
    recorder_with: MakeRecorder, guards: list[Guard]
) -> None:
    recorder = await started(recorder_with, "socket", recorder_helper="/nowhere/corepipe")
    await guarding(guards, recorder)

    recorder.kill_with_watchdogs()

    await until(lambda: core_pattern.current() == BEFORE)


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_guard_leaves_crashes_to_the_helper_until_it_is_stopped_last(
    recorder_with: MakeRecorder, guards: list[Guard], mechanism: str
) -> None:
    recorder = await started(recorder_with, mechanism)
    recorder.kill_with_watchdogs()
    guard = await guarding(guards, recorder)
    helper = recorder.state / "recorder" / "corepipe"
    await until(lambda: core_pattern.current().startswith(f"|{helper} "))

    assert guard.stop() == 0

    assert core_pattern.current() == BEFORE
    assert not helper.exists()
    assert not (recorder.state.with_name("run") / "s").exists()


async def test_guard_leaves_no_core_when_it_crashes(
    recorder_with: MakeRecorder, guards: list[Guard]
) -> None:
    recorder = await started(recorder_with, "pipe")
    guard = await guarding(guards, recorder)

    guard.process.send_signal(signal.SIGSEGV)
    assert guard.process.wait(60) == -signal.SIGSEGV

    pid, _ = crash(crasher("null_pointer"))
    await recorder.captured(pid)
    assert [path.name for path in recorder.spool.glob("[0-9]*")] == [str(pid)]


async def test_guard_leaves_a_recorder_that_runs_alone(
    recorder_with: MakeRecorder, guards: list[Guard]
) -> None:
    recorder = await started(recorder_with, "socket")
    guard = await guarding(guards, recorder)

    assert guard.stop() == 0

    assert core_pattern.current().startswith("@")
    assert (recorder.state.with_name("run") / "s").exists()


async def test_whom_a_recorder_holds_that_is_paused_with_its_watchdogs_is_freed(
    recorder_with: MakeRecorder,
) -> None:
    """As `docker pause` stops them. With the socket, whoever crashes then is held without end."""
    recorder = await started(recorder_with, "socket")
    for one in (recorder.pid, *recorder.watchdogs()):
        await stop(one)
    looks = 3
    paused = Paused(lambda: looks)
    crashed = [await held(crasher("null_pointer"))]
    try:
        paused.look()
        for _ in range(SILENT_AFTER):
            assert paused.look() == 0
        crashed.append(await held(crasher("null_pointer")))

        freed = [paused.look() for _ in range(looks)]

        assert freed[:-1] == [0, 0] and freed[-1] >= 1
        early, late = crashed
        assert await asyncio.to_thread(early.wait, 60) == -signal.SIGKILL
        assert late.poll() is None  # it may still be in the hands of the pipe helper
        assert any(paused.look() for _ in range(looks))
        assert await asyncio.to_thread(late.wait, 60) == -signal.SIGKILL
    finally:
        recorder.kill_with_watchdogs()


def test_process_that_ends_while_it_is_looked_at_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = subprocess.Popen(["sleep", "60"])
    pidfd_open = os.pidfd_open

    def end_then(pid: int) -> int:
        opened = pidfd_open(pid)
        if pid == process.pid:
            process.kill()
            process.wait()
        return opened

    monkeypatch.setattr(os, "pidfd_open", end_then)
    before = len([*Path("/proc/self/fd").iterdir()])

    for other in watchdog.dumping():
        os.close(other)

    assert process.returncode is not None
    assert len([*Path("/proc/self/fd").iterdir()]) == before


async def held(program: Path) -> "subprocess.Popen[bytes]":
    """Crash a program that nobody lets go."""
    process = subprocess.Popen([program])
    status = Path(f"/proc/{process.pid}/status")
    await until(lambda: "CoreDumping:\t1" in status.read_text())
    return process


@pytest.mark.parametrize("told", [None, 1.0])
def test_recorder_that_never_gives_a_sign_of_life_is_not_taken_for_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: float | None
) -> None:
    """As one of before they were; others say their patience first of all."""
    monkeypatch.setattr(pattern_file, "LOCK", tmp_path / "lock")
    pattern_file.LOCK.touch()
    if told is not None:
        pattern_file.tell_patience(told)
    looked = []

    def look() -> list[int]:
        looked.append(True)
        return []

    monkeypatch.setattr(watchdog, "dumping", look)
    paused = Paused(patience)

    for _ in range(SILENT_AFTER + 1):
        paused.look()

    assert looked == ([] if told is None else [True])


async def test_guard_has_the_patience_that_the_recorder_s_settings_ask_for(
    recorder_with: MakeRecorder,
) -> None:
    await started(recorder_with, "pipe", recorder_watchdog_deadline=600)
    looks = patience()
    assert looks is not None
    assert looks * LOOK_EVERY > 2 * 600


@pytest.mark.parametrize("told", ["nan", "inf", "1e300", "-1"])
def test_no_patience_is_without_end_or_without_the_helper_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.setattr(pattern_file, "LOCK", tmp_path / "lock")
    pattern_file.tell_patience(float(told))
    looks = patience()
    assert looks is not None
    assert HELPER_WITHIN <= looks * LOOK_EVERY <= 4 * 3600


async def test_recorder_gives_signs_of_life(recorder_with: MakeRecorder) -> None:
    await started(recorder_with, "pipe")
    first = pattern_file.last_beat()
    await until(lambda: pattern_file.last_beat() != first)
