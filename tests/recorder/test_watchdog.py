"""What the watchdog does when the recorder is stopped, killed, or loses it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recorder.conftest import MakeRecorder
from tests.support import core_pattern
from tests.support.cgroup import Freezer
from tests.support.crashers import crasher
from tests.support.recorder import crash
from tests.support.wait import stop, until


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_stopped_recorder_holds_nobody_beyond_its_deadline(
    recorder_with: MakeRecorder, mechanism: str
) -> None:
    recorder = recorder_with(recorder_mechanism=mechanism, recorder_watchdog_deadline=3)
    await recorder.start()
    assert recorder.process is not None
    await stop(recorder.pid)
    process = subprocess.Popen([crasher("null_pointer")])

    status = await asyncio.to_thread(process.wait, 60)

    assert status == -signal.SIGSEGV
    assert recorder.process.wait(30) == -signal.SIGKILL
    await until(lambda: core_pattern.current().startswith("|"), 60)
    meanwhile, _ = await asyncio.to_thread(crash, crasher("null_pointer"))
    await until(lambda: "killed a recorder that did not work any more" in recorder.log, 60)
    await recorder.start()
    pid, _ = crash(crasher("null_pointer"))
    assert (await recorder.captured(pid)).state == "complete"
    # With the socket, what the stopped recorder had in hand is lost.
    for kept in (meanwhile, process.pid) if mechanism == "pipe" else (meanwhile,):
        record = await recorder.captured(kept)
        assert not any(file.truncated for file in record.files.values())


async def test_crash_of_the_moment_after_sigkill_is_kept(recorder_with: MakeRecorder) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    before = core_pattern.pipe_limit()
    recorder = recorder_with(recorder_mechanism="socket")
    await recorder.start()
    taken = core_pattern.current()

    recorder.kill()
    await until(lambda: core_pattern.current() != taken, every=0.001)
    pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"))

    await recorder.start()
    assert core_pattern.current() == taken
    record = await recorder.captured(pid)
    assert not any(file.truncated for file in record.files.values())
    assert recorder.stop() == 0
    assert core_pattern.current() == "/somewhere/core.%p"
    assert core_pattern.pipe_limit() == before


def test_watchdog_has_nothing_to_load_before_the_helper_stands_in() -> None:
    """What logs and settings are made of takes a hundred times as long as all the rest."""
    listed = "import services.recorder.watchdog, sys; print(*sys.modules)"

    loaded = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True).stdout

    assert "services.recorder.pattern_file" in loaded
    assert not {"structlog", "pydantic"} & set(loaded.split())


async def test_core_pattern_is_put_back_after_sigkill_where_there_is_no_helper(
    recorder_with: MakeRecorder,
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with(recorder_mechanism="socket", recorder_helper="/nowhere/corepipe")
    await recorder.start()
    assert "crashes while no recorder is there will not be kept" in recorder.log

    recorder.kill()

    await until(lambda: core_pattern.current() == "/somewhere/core.%p", 60)
    await until(lambda: "core_pattern put back" in recorder.log, 60)


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
@pytest.mark.parametrize("what", ["cannot be written", "are too long for the helper"])
async def test_core_pattern_is_put_back_after_sigkill_where_rules(
    recorder_with: MakeRecorder, mechanism: str, what: str
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    off = f"executable={'x' * (64 * 1024)}" if "long" in what else ""
    recorder = recorder_with(recorder_mechanism=mechanism, recorder_core_off=off)
    if not off:
        (recorder.state / "recorder" / "rules.new").mkdir(parents=True)
    await recorder.start()
    assert "crashes while no recorder is there will not be kept" in recorder.log

    recorder.kill()

    await until(lambda: core_pattern.current() == "/somewhere/core.%p", 60)


async def test_recorder_that_took_over_is_left_alone(recorder_with: MakeRecorder) -> None:
    first = recorder_with()
    await first.start()
    taken = core_pattern.current()
    watchdogs = first.watchdogs()
    for watchdog in watchdogs:
        os.kill(watchdog, signal.SIGSTOP)
    first.kill()
    second = recorder_with(state=first.state, recorder_socket=first.socket)
    await second.start()
    assert core_pattern.current() == taken

    for watchdog in watchdogs:
        os.kill(watchdog, signal.SIGCONT)
    await until(lambda: first.log.count("core_pattern stays as it is") == 2, 60)

    assert core_pattern.current() == taken
    pid, _ = crash(crasher("null_pointer"))
    assert (await second.captured(pid)).state == "complete"


async def test_recorder_at_work_is_left_alone(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with(recorder_watchdog_deadline=3)
    await recorder.start()
    assert recorder.process is not None

    with pytest.raises(subprocess.TimeoutExpired):
        await asyncio.to_thread(recorder.process.wait, 5)


@pytest.mark.parametrize(
    ("which", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)]
)
async def test_watchdog_that_does_not_watch_is_replaced(
    recorder_with: MakeRecorder, which: int, how: signal.Signals
) -> None:
    recorder = recorder_with(recorder_watchdog_deadline=3)
    await recorder.start()
    former = recorder.watchdogs()[which]

    os.kill(former, how)

    await until(lambda: former not in recorder.watchdogs() and len(recorder.watchdogs()) == 2, 60)
    assert "a watchdog is gone, or stopped: starting another" in recorder.log


async def test_recorder_and_watchdog_that_are_stopped_hold_nobody(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with(recorder_mechanism="socket", recorder_watchdog_deadline=3)
    await recorder.start()
    assert recorder.process is not None
    watchdog = recorder.watchdogs()[0]
    for pid in (watchdog, recorder.pid):
        await stop(pid)

    _, number = await asyncio.to_thread(crash, crasher("null_pointer"), within=60)

    assert number == signal.SIGSEGV
    assert await asyncio.to_thread(recorder.process.wait, 60) == -signal.SIGKILL
    await until(lambda: core_pattern.current().startswith("|"), 60)
    os.kill(watchdog, signal.SIGCONT)  # it finds its recorder gone, and ends


@pytest.fixture
def freezer() -> Iterator[Freezer]:
    place = Freezer()
    yield place
    place.remove()


async def test_frozen_cgroup_of_the_recorder_holds_nobody(
    recorder_with: MakeRecorder, freezer: Freezer
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with(recorder_mechanism="socket", recorder_watchdog_deadline=3)
    recorder.prefix = ("sh", "-c", f'echo $$ >{freezer.procs}; exec "$@"', "sh")
    await recorder.start()
    assert recorder.process is not None
    await until(lambda: not set(recorder.watchdogs()) & set(freezer.pids()), 60)
    assert recorder.pid in freezer.pids()
    freezer.freeze()

    _, number = await asyncio.to_thread(crash, crasher("null_pointer"), within=60)

    # What waits for a recorder that does not even die of SIGKILL is killed itself.
    assert number in (signal.SIGSEGV, signal.SIGKILL)
    await until(lambda: core_pattern.current() == "/somewhere/core.%p", 60)
    freezer.thaw()
    assert await asyncio.to_thread(recorder.process.wait, 60) == -signal.SIGKILL


async def test_watchdog_ends_with_its_recorder(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with()
    await recorder.start()
    watchdogs = recorder.watchdogs()

    assert recorder.stop() == 0

    assert len(watchdogs) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in watchdogs)
