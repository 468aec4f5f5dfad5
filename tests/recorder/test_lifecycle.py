"""What a recorder does to the host while it starts, stops, is killed, or runs out of something."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from crashbus import Bus, DeadLetter, capture, identity
from services.recorder import core_head
from tests.recorder.conftest import MakeRecorder
from tests.support import core_pattern
from tests.support.crashers import crasher
from tests.support.fuse import StandingStill
from tests.support.nats import NatsServer
from tests.support.recorder import FILES, RecorderService, crash
from tests.support.requirements import need_program, need_root
from tests.support.wait import until

_HOG = """
import ctypes, mmap, sys
size = int(sys.argv[1]) << 20
memory = mmap.mmap(-1, size)
memory.write(b"\\xa5" * size)
ctypes.string_at(0)
"""
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

HOG = ("/usr/bin/python3", "-c", _HOG)


def kill_both(recorder: RecorderService) -> None:
    """Kill a recorder that is stopped, so that its watchdogs are neither missed nor quick."""
    os.kill(recorder.pid, signal.SIGSTOP)
    for watchdog in recorder.watchdogs():
        os.kill(watchdog, signal.SIGKILL)
    recorder.kill()


@pytest.mark.parametrize(("result", "stays"), [("signal", True), ("success", False)])
async def test_pipe_helper_stays_while_systemd_starts_a_killed_recorder_again(
    recorder_with: MakeRecorder, result: str, stays: bool
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with(recorder_mechanism="pipe")
    await recorder.start()
    kill_both(recorder)
    command = [
        ".venv/bin/python", "-m", "services.recorder.core_pattern",
        "--restore", "--state", str(recorder.state),
    ]  # fmt: skip

    subprocess.run(command, check=True, env=os.environ | {"SERVICE_RESULT": result})

    assert core_pattern.current().startswith("|" if stays else "/somewhere")


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_core_pattern_is_put_back_after_sigterm(
    recorder_with: MakeRecorder, mechanism: str
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    before = core_pattern.pipe_limit()
    recorder = recorder_with(recorder_mechanism=mechanism)
    await recorder.start()

    assert recorder.stop() == 0

    assert core_pattern.current() == "/somewhere/core.%p"
    assert core_pattern.pipe_limit() == before
    assert "old=/somewhere/core.%p" in recorder.log


async def test_core_pattern_of_before_survives_a_killed_recorder_and_watchdog(
    recorder_with: MakeRecorder,
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with()
    await recorder.start()
    kill_both(recorder)
    assert core_pattern.current().startswith("@")

    await recorder.start()
    recorder.stop()

    assert core_pattern.current() == "/somewhere/core.%p"


async def test_core_pattern_can_be_put_back_without_a_recorder(
    recorder_with: MakeRecorder,
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with()
    await recorder.start()
    command = [
        ".venv/bin/python", "-m", "services.recorder.core_pattern",
        "--restore", "--state", str(recorder.state),
    ]  # fmt: skip

    refused = subprocess.run(command, capture_output=True, text=True)
    kill_both(recorder)
    subprocess.run(command, check=True, capture_output=True)

    assert "a recorder runs on this host already" in refused.stderr
    assert core_pattern.current() == "/somewhere/core.%p"


async def test_pattern_that_somebody_else_set_meanwhile_stays(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await recorder.start()
    core_pattern.set_pattern("/theirs/core")
    await until(lambda: "core_pattern was changed" in recorder.log)

    assert recorder.stop() == 0

    assert core_pattern.current() == "/theirs/core"


async def test_other_handler_is_named_when_it_is_replaced(recorder_with: MakeRecorder) -> None:
    core_pattern.set_pattern("|/bin/false %P")
    recorder = recorder_with()

    await recorder.start()

    assert re.search(r"taking over from another handler.*handler=false", recorder.log)


async def test_second_recorder_with_the_same_state_is_refused(
    recorder_with: MakeRecorder,
) -> None:
    first = recorder_with()
    second = recorder_with(state=first.state)
    await first.start()

    second.launch()
    assert second.process is not None
    assert second.process.wait(60) == 2

    assert "a recorder runs on this host already" in second.log
    assert "Traceback" not in second.log
    pid, _ = crash(crasher("null_pointer"))
    await first.captured(pid)


async def test_state_that_others_may_write_to_is_refused(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    (tmp_path / "recorder").mkdir()
    (tmp_path / "recorder").chmod(0o777)
    before = core_pattern.current()
    recorder = recorder_with(state=tmp_path, recorder_mechanism="pipe")

    recorder.launch()
    assert recorder.process is not None

    assert recorder.process.wait(60) == 2
    assert "others may write to" in recorder.log
    assert core_pattern.current() == before


async def test_recorder_cannot_dump_to_itself(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with()
    await recorder.start()
    assert recorder.process is not None

    recorder.process.send_signal(signal.SIGSEGV)
    recorder.process.wait(5)

    assert not list(recorder.spool.glob("*"))
    await recorder.start()
    pid, _ = crash(crasher("null_pointer"))
    await recorder.captured(pid)


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_storm_of_fifty_crashes_at_once_loses_none(
    recorder_with: MakeRecorder, mechanism: str
) -> None:
    recorder = recorder_with(recorder_mechanism=mechanism, recorder_backtrace_deadline=0.1)
    await recorder.start()
    program = str(crasher("waiting"))
    processes = [subprocess.Popen([program], stdout=subprocess.PIPE) for _ in range(50)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()

    for process in processes:
        process.send_signal(signal.SIGSEGV)
    for process in processes:
        process.communicate(timeout=30)
    records = [await recorder.captured(process.pid, 30) for process in processes]

    for record in records:
        assert len(record.files) == len(FILES)
        assert not any(file.truncated for file in record.files.values())
    assert len({record.crash_id for record in records}) == 50


def memory_of(recorder: RecorderService) -> int:
    """Return the memory of a recorder and all its workers in bytes, shared pages in parts."""
    total = 0
    for pid in (recorder.pid, *recorder.children()):
        with suppress(OSError, ValueError, StopIteration):  # a worker ends
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += int(next(line.split()[1] for line in lines if line.startswith("Pss:")))
    return total * 1024


def is_whole(core: Path) -> bool:
    with core.open("rb") as file:
        return core_head.read(file.read).size == core.stat().st_size


async def test_storm_of_two_hundred_crashes_at_once_is_captured_in_constant_memory(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with(
        recorder_loop_burst=0,
        recorder_debug_directory="/nonexistent",  # this host may have any
    )
    await recorder.start()
    program = str(crasher("waiting"))
    processes = [subprocess.Popen([program], stdout=subprocess.PIPE) for _ in range(200)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()

    for process in processes:
        process.send_signal(signal.SIGSEGV)
    most = 0
    while any(process.poll() is None for process in processes) or not finished(recorder, 10):
        most = max(most, await asyncio.to_thread(memory_of, recorder))
        await asyncio.sleep(0.05)

    for process in processes:
        process.communicate()
        assert process.returncode == -signal.SIGSEGV
        assert is_whole(recorder.file(process.pid, "core"))
    assert most < 150 << 20, f"{most >> 20} MiB"


def finished(recorder: RecorderService, count: int) -> bool:
    """Tell whether so many crashes have their backtraces."""
    return len(list(recorder.spool.glob("*/backtrace_*.json"))) >= count


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


async def test_core_over_the_limit_is_cut_and_flagged(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with(recorder_max_core_bytes=2_000_000, recorder_core_source="stream")
    await recorder.start()

    pid, _ = crash(*HOG, "100")
    record = await recorder.captured(pid)

    described = record.files[recorder.file(pid, "core").name]
    assert (described.size, described.truncated) == (2_000_000, True)
    assert described.note == "cut at the limit of 2000000 bytes"
    assert recorder.file(pid, "core").stat().st_size == 2_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB."""
    need_program("mount")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(
    ("source", "note"), [("auto", "bytes of memory were left out"), ("stream", "cut at the limit")]
)
async def test_full_disk_costs_the_rest_of_the_core_and_nothing_else(
    recorder_with: MakeRecorder, small_disk: Path, source: str, note: str
) -> None:
    recorder = recorder_with(spool=small_disk / "spool", recorder_core_source=source)
    recorder.spool = small_disk / "spool"
    await recorder.start()

    pid, number = crash(*HOG, "100")
    record = await recorder.captured(pid)

    assert number == signal.SIGSEGV
    core = record.files[recorder.file(pid, "core").name]
    assert core.truncated
    assert note in (core.note or "")
    assert 10 << 20 < core.size == recorder.file(pid, "core").stat().st_size
    assert len(record.files) == len(FILES)
    assert json.loads(recorder.file(pid, "snapshot").read_bytes())["Pid"] == pid
    # The crash after it is captured as far as it goes, and the recorder is still there.
    second, _ = crash(*HOG, "100")
    assert (await recorder.captured(second)).state == "complete"


async def test_crash_that_cannot_be_captured_is_a_dead_letter(
    recorder_with: MakeRecorder, small_disk: Path, nats_server: NatsServer, bus: Bus
) -> None:
    (small_disk / "full").write_bytes(b"x" * (23 << 20))
    with (small_disk / "fuller").open("wb") as file, pytest.raises(OSError):
        while True:
            os.write(file.fileno(), b"x" * 4096)
    recorder = recorder_with(spool=small_disk / "spool", nats_url=nats_server.url)
    await recorder.start()

    _, number = crash(crasher("null_pointer"))

    assert number == signal.SIGSEGV
    letters = await until(lambda: bus.stored(DeadLetter))
    assert letters[0].service == "recorder"
    assert letters[0].reason in ("spool_unusable", "capture_failed")
    assert "df " in letters[0].mend
    assert letters[0].crash_id


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
    recorder = recorder_with()
    await recorder.start()
    path = core_pattern.current().lstrip("@")

    _, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET / HTTP/1.1\r\n\r\n" * 4)
    await writer.drain()
    pid, _ = crash(crasher("null_pointer"))

    assert (await recorder.captured(pid)).state == "complete"
    await until(lambda: "handshake_failed" in recorder.log)
    writer.close()


@pytest.fixture
def frozen_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk on which every write waits, until `thaw`."""
    need_program("mkfs.ext4")
    place, image = tmp_path / "disk", tmp_path / "image"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_disk_that_hangs_does_not_hang_the_crashing_processes(
    recorder_with: MakeRecorder, frozen_disk: Path, mechanism: str
) -> None:
    recorder = recorder_with(
        spool=frozen_disk / "spool",
        recorder_mechanism=mechanism,
        recorder_stall_deadline=1,
        recorder_captures=1,
    )
    recorder.spool = frozen_disk / "spool"
    await recorder.start()
    program = str(crasher("null_pointer"))
    subprocess.run(["fsfreeze", "-f", str(frozen_disk)], check=True)
    try:
        # The first hangs in the only thread there is, the others behind it.
        crashes = [subprocess.Popen([program]) for _ in range(3)]
        numbers = [process.wait(60) for process in crashes]
        await until(lambda: recorder.log.count("let a process go") >= 3)
    finally:
        subprocess.run(["fsfreeze", "-u", str(frozen_disk)], check=True)

    assert numbers == [-signal.SIGSEGV] * 3
    pid, _ = crash(program)
    assert (await recorder.captured(pid)).state == "complete"


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


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_process_that_waits_for_a_busy_recorder_is_let_go_and_told(
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


async def test_file_system_that_does_not_answer_holds_up_only_its_own_crashes(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    need_root()
    recorder = recorder_with(recorder_captures=2, recorder_stall_deadline=6)
    await recorder.start()
    with StandingStill(tmp_path / "fuse", crasher("waiting")) as file_system:
        hung = [subprocess.Popen([file_system.program], stdout=subprocess.PIPE) for _ in range(4)]
        for process in hung:
            assert process.stdout is not None
            process.stdout.readline()
        file_system.stand_still()
        for process in hung:
            process.send_signal(signal.SIGSEGV)

        pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"))

        assert (await recorder.captured(pid)).state == "complete"
        assert all(process.poll() is None for process in hung), "nothing stood still"
        # They are let go in their time, and told.
        for process in hung:
            assert await asyncio.to_thread(process.wait, 30) == -signal.SIGSEGV
        assert recorder.log.count("let a process go") == 4
    # Their threads are free again, and what could be read is there.
    for process in hung:
        process.communicate()
        record = await recorder.captured(process.pid)
        assert record.signal_name == "SIGSEGV"
        assert any(file.truncated for file in record.files.values())
    assert recorder.stop() == 0
