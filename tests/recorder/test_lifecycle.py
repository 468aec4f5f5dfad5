"""What a recorder does to the host while it starts, stops, is killed, or held up."""

import asyncio
import signal
import subprocess
import sys
import time

import pytest

from crashbus import Bus, DeadLetter, identity
from services.common import capture
from tests.recorder.conftest import MakeRecorder
from tests.support import core_pattern
from tests.support.crashers import HOG, crasher
from tests.support.nats import NatsServer
from tests.support.recorder import crash
from tests.support.wait import until

# A process may reserve far more than there is, mmap(2). The kernel reads over what was never
# touched without a word, and writes it as zeros once something follows.
_RESERVING = """
import ctypes, mmap, sys
MAP_NORESERVE = 0x4000
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
memory = mmap.mmap(-1, 60 << 40, flags=flags)
for place in range(0, int(sys.argv[1]) + 1, 1 << 21):
    memory[place] = 1
ctypes.string_at(0)
"""
ENDLESS = ("/usr/bin/python3", "-c", _RESERVING, str(1 << 36))
EMPTY = ("/usr/bin/python3", "-c", _RESERVING, "0")

# What the collector's retention does with a directory that is empty.
_REMOVER = """
import os, sys
from pathlib import Path
while True:
    for path in Path(sys.argv[1]).glob("*"):
        try:
            path.rmdir()
        except OSError:
            pass
"""


async def test_recorder_cannot_dump_to_itself(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with()
    await recorder.start()
    assert recorder.process is not None

    recorder.process.send_signal(signal.SIGSEGV)
    recorder.process.wait(5)

    assert not list(recorder.spool.glob("[0-9]*"))
    await recorder.start()
    pid, _ = crash(crasher("null_pointer"))
    await recorder.captured(pid)


async def test_backtrace_that_failed_is_told(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with(recorder_backtrace_deadline=0.1)
    await recorder.start()

    pid, _ = crash(crasher("null_pointer"))
    record = await recorder.captured(pid)

    assert any(note.startswith("backtrace failed: there was no") for note in record.notes)
    assert "backtrace failed: there was no" in recorder.file(pid, "backtrace").read_text()


async def test_crash_in_hand_is_finished_after_sigterm(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with()
    await recorder.start()
    process = subprocess.Popen([*HOG, "300"], stderr=subprocess.DEVNULL)
    await until(lambda: list(recorder.spool.glob(f"{process.pid}/core_*")))

    assert recorder.stop() == 0

    assert process.wait(5) == -signal.SIGSEGV
    record = recorder.record(process.pid)
    assert record is not None, recorder.log
    assert not record.files[f"core_{int(record.crashed_at)}"].truncated


async def test_killed_recorder_lets_the_process_go_and_leaves_the_set_cut_short(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await recorder.start()
    process = subprocess.Popen([*HOG, "300"], stderr=subprocess.DEVNULL)
    await until(lambda: list(recorder.spool.glob(f"{process.pid}/core_*")))

    recorder.kill()

    assert process.wait(5) == -signal.SIGSEGV
    with recorder.file(process.pid, "capture").open("rb") as file:
        assert not capture.is_being_written(file.fileno())
        assert capture.read(file.fileno()).state == "writing"


# The real recorder, which a real SIGKILL ends when it would begin with a backtrace.
_KILLED_BEFORE_ITS_BACKTRACE = """
import os, runpy, signal, sys
from services.recorder import finishing
finishing.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ["recorder"]
runpy.run_module("services.recorder", run_name="__main__")
"""


async def test_recorder_killed_before_the_backtrace_has_said_what_is_whole(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    recorder.prefix = (sys.executable, "-c", _KILLED_BEFORE_ITS_BACKTRACE)
    await recorder.start()

    pid, _ = crash(crasher("null_pointer"))
    assert recorder.process is not None
    assert await asyncio.to_thread(recorder.process.wait, 60) == -signal.SIGKILL

    with recorder.file(pid, "capture").open("rb") as file:
        record = capture.read(file.fileno())
    assert record.state == "writing"
    for kind in ("info", "cfg", "core"):
        path = recorder.file(pid, kind)
        told = record.files[path.name]
        assert (told.size, told.truncated) == (path.stat().st_size, False)


async def test_process_killed_while_it_dumps_leaves_a_truncated_core(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await recorder.start()
    process = subprocess.Popen([*HOG, "300"], stderr=subprocess.DEVNULL)
    core = await until(lambda: list(recorder.spool.glob(f"{process.pid}/core_*")))
    await until(lambda: core[0].stat().st_size > 1 << 20)

    process.kill()
    process.wait(5)
    record = await recorder.captured(process.pid)

    described = record.files[core[0].name]
    assert described.truncated
    assert "bytes are missing: the process was killed while it dumped" in (described.note or "")
    assert described.size == core[0].stat().st_size


async def test_capture_does_not_wait_for_the_bus(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with(nats_url="nats://127.0.0.1:1")
    await recorder.start()

    pid, _ = crash(crasher("null_pointer"))
    record = await recorder.captured(pid)

    assert record.state == "complete"


async def test_spool_that_is_removed_while_it_runs_is_made_again(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await recorder.start()
    first, _ = crash(crasher("null_pointer"))
    await recorder.captured(first)

    subprocess.run(["rm", "-rf", str(recorder.spool)], check=True)
    second, _ = crash(crasher("null_pointer"))

    assert (await recorder.captured(second)).state == "complete"


async def test_foreign_connection_is_refused_and_hurts_nobody(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with(recorder_mechanism="socket")
    await recorder.start()
    path = core_pattern.current().lstrip("@")

    _, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET / HTTP/1.1\r\n\r\n" * 4)
    await writer.drain()
    pid, _ = crash(crasher("null_pointer"))

    assert (await recorder.captured(pid)).state == "complete"
    await until(lambda: "handshake_failed" in recorder.log)
    writer.close()


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_crash_while_the_recorder_is_dead_does_not_hang(
    recorder_with: MakeRecorder, mechanism: str
) -> None:
    recorder = recorder_with(recorder_mechanism=mechanism)
    await recorder.start()
    recorder.kill()

    began = time.monotonic()
    _, number = crash(crasher("null_pointer"))

    assert number == signal.SIGSEGV
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
@pytest.mark.parametrize(
    ("program", "note"), [("ENDLESS", "HOLD_DEADLINE"), ("EMPTY", "nothing came for 3 s")]
)
async def test_core_without_an_end_does_not_hold_its_process(
    recorder_with: MakeRecorder, mechanism: str, program: str, note: str
) -> None:
    recorder = recorder_with(
        recorder_mechanism=mechanism,
        recorder_core_source="stream",
        recorder_max_core_bytes=0,
        recorder_stall_deadline=3 if program == "EMPTY" else 60,
        recorder_hold_deadline=3 if program == "ENDLESS" else 60,
    )
    await recorder.start()

    pid, number = crash(*{"ENDLESS": ENDLESS, "EMPTY": EMPTY}[program])
    record = await recorder.captured(pid)

    # Nothing but SIGKILL ends a dump that writes nothing.
    assert number == (signal.SIGSEGV if program == "ENDLESS" else signal.SIGKILL)
    core = record.files[recorder.file(pid, "core").name]
    assert core.truncated
    assert note in (core.note or "")


async def test_kernel_does_not_dump_on_when_a_sparse_giant_is_captured(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await recorder.start()

    pid, number = await asyncio.to_thread(crash, crasher("sparse_giant"))

    assert number == signal.SIGKILL  # it goes over terabytes of nothing
    record = await recorder.captured(pid)
    assert record.signal_name == "SIGSEGV"
    assert not any(file.truncated for file in record.files.values())


async def test_kernel_does_not_dump_on_when_the_recorder_ends_meanwhile(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await recorder.start()
    process = subprocess.Popen(crasher("sparse_giant"))
    try:
        await until(lambda: list(recorder.spool.glob(f"{process.pid}/core_*")))

        assert recorder.stop() == 0

        assert await asyncio.to_thread(process.wait, 5) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_process_that_waits_for_a_busy_recorder_is_let_go_and_kept_or_told(
    recorder_with: MakeRecorder, nats_server: NatsServer, bus: Bus, mechanism: str
) -> None:
    recorder = recorder_with(
        nats_url=nats_server.url,
        recorder_mechanism=mechanism,
        recorder_captures=1,
        recorder_core_source="stream",
        recorder_max_core_bytes=0,
        recorder_stall_deadline=2,
    )
    await recorder.start()
    endless = subprocess.Popen(ENDLESS, stderr=subprocess.DEVNULL)
    try:
        await until(lambda: list(recorder.spool.glob(f"{endless.pid}/core_*")))
        behind = subprocess.Popen([crasher("waiting")], stdout=subprocess.PIPE)
        assert behind.stdout is not None
        with behind.stdout:
            behind.stdout.readline()
        boot, ticks = identity.boot_id(), identity.start_ticks(behind.pid)
        behind.send_signal(signal.SIGSEGV)

        assert behind.wait(8) == -signal.SIGSEGV
        assert endless.poll() is None
    finally:
        endless.kill()
        endless.wait()

    def told() -> list[DeadLetter]:
        name = identity.crash_id(boot, behind.pid, ticks)
        return [letter for letter in bus_letters if letter.crash_id == name]

    if mechanism == "pipe":  # its helper has kept it
        record = await recorder.captured(behind.pid)
        assert any("pipe helper kept it" in note for note in record.notes)
        return
    bus_letters = await until(lambda: bus.stored(DeadLetter))
    assert [letter.reason for letter in told()] == ["capture_failed"]
    assert "waited" in told()[0].error
    assert (await recorder.captured(endless.pid)).state == "complete"


async def test_record_is_made_though_its_directory_is_removed_again_and_again(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with(recorder_backtrace_deadline=0.1)
    await recorder.start()
    remover = subprocess.Popen([sys.executable, "-c", _REMOVER, str(recorder.spool)])
    try:
        pids = [crash(crasher("null_pointer"))[0] for _ in range(20)]
        for pid in pids:
            assert (await recorder.captured(pid)).state == "complete"
    finally:
        remover.kill()
        remover.wait()


async def test_unusable_settings_are_told_in_a_line(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with(recorder_mechanism="pigeon")

    recorder.launch()
    assert recorder.process is not None

    assert recorder.process.wait(60) == 2
    assert "CRASHBUS_RECORDER_MECHANISM" in recorder.log
    assert "Traceback" not in recorder.log
