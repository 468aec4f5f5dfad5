"""What a recorder does when it runs out of something, or what it needs does not answer."""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from crashbus import Bus, DeadLetter, layout
from services.common import core_stream
from services.recorder.core import turns
from tests.recorder.conftest import MakeRecorder
from tests.recorder.test_storm import is_dumping
from tests.support.crashers import HOG, crasher
from tests.support.disk import small_disk, tmpfs
from tests.support.fuse import StandingStill
from tests.support.nats import NatsServer, free_port
from tests.support.recorder import FILES, crash
from tests.support.requirements import need_program, need_root
from tests.support.victim import waiting
from tests.support.wait import until


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
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    with tmpfs(tmp_path / "disk", "size=24m") as place:
        yield place


@pytest.mark.parametrize(
    ("source", "note"), [("auto", "bytes of memory were left out"), ("stream", "cut at the limit")]
)
async def test_full_disk_costs_the_rest_of_the_core_and_nothing_else(
    recorder_with: MakeRecorder, small_memory: Path, source: str, note: str
) -> None:
    recorder = recorder_with(spool=small_memory / "spool", recorder_core_source=source)
    recorder.spool = small_memory / "spool"
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
    recorder_with: MakeRecorder, small_memory: Path, nats_server: NatsServer, bus: Bus
) -> None:
    (small_memory / "full").write_bytes(b"x" * (23 << 20))
    with (small_memory / "fuller").open("wb") as file, pytest.raises(OSError):
        while True:
            os.write(file.fileno(), b"x" * 4096)
    recorder = recorder_with(spool=small_memory / "spool", nats_url=nats_server.url)
    await recorder.start()

    _, number = crash(crasher("null_pointer"))

    assert number == signal.SIGSEGV
    letters = await until(lambda: bus.stored(DeadLetter))
    assert letters[0].service == "recorder"
    assert letters[0].reason in ("spool_unusable", "capture_failed")
    assert "df " in letters[0].mend
    assert letters[0].crash_id


async def test_crash_of_which_no_file_could_be_made_is_a_dead_letter(
    recorder_with: MakeRecorder, tmp_path: Path, nats_server: NatsServer, bus: Bus
) -> None:
    with small_disk(tmp_path / "disk", 32) as disk:
        spool = disk.place / "spool"
        recorder = recorder_with(spool=spool, nats_url=nats_server.url, recorder_core_to="disk")
        recorder.spool = spool
        await recorder.start()
        first, _ = crash(crasher("null_pointer"))
        await recorder.captured(first)  # what is made once is there

        async def told() -> tuple[int, DeadLetter] | None:
            """Have a process crash with inodes for its directory and its record alone."""
            before = len(await bus.stored(DeadLetter))
            disk.take_inodes(leaving=2)
            pid, _ = crash(crasher("null_pointer"))
            letter = (await until(lambda: letters(before)))[-1]
            # Another's crash may have taken them.
            return (pid, letter) if "info_" in letter.error else None

        async def letters(before: int) -> list[DeadLetter]:
            return (await bus.stored(DeadLetter))[before:]

        pid, letter = await until(told)

        assert letter.reason == "capture_failed"
        assert "No space left on device" in letter.error
        assert "df -i" in letter.mend
        assert letter.crash_id
        assert not list((spool / str(pid)).glob("*"))
        recorder.stop()


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_disk_that_hangs_does_not_hang_the_crashing_processes(
    recorder_with: MakeRecorder, tmp_path: Path, mechanism: str
) -> None:
    with small_disk(tmp_path / "disk", 32) as disk:
        recorder = recorder_with(
            spool=disk.place / "spool",
            recorder_mechanism=mechanism,
            recorder_stall_deadline=1,
            recorder_captures=1,
        )
        recorder.spool = disk.place / "spool"
        await recorder.start()
        program = str(crasher("null_pointer"))
        with disk.hanging():
            # The first hangs in the only thread there is, the others behind it.
            crashes = [subprocess.Popen([program]) for _ in range(3)]
            numbers = [process.wait(60) for process in crashes]
            await until(lambda: recorder.log.count("let a process go") >= 3)

        assert numbers == [-signal.SIGSEGV] * 3
        pid, _ = crash(program)
        assert (await recorder.captured(pid)).state == "complete"
        recorder.stop()


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


# Maps more than a small core has, and touches more of it than the disk has room for.
_LARGE = """
import ctypes, mmap
memory = mmap.mmap(-1, 400 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, 64 << 20, 4096):
    memory[page] = 1
ctypes.string_at(0)
"""


async def test_large_cores_that_take_long_hold_up_no_small_one(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 48) as disk:
        spool = disk.place / "spool"
        recorder = recorder_with(spool=spool, recorder_captures=2, recorder_stall_deadline=8)
        recorder.spool = spool
        await recorder.start()
        with core_stream.listen(spool):  # a collector that never answers
            large = [subprocess.Popen(["/usr/bin/python3", "-c", _LARGE]) for _ in range(3)]
            await until(lambda: all(is_dumping(process.pid) for process in large))

            pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"), within=10)

            assert (await recorder.captured(pid)).state == "complete"
            assert not all(process.poll() for process in large), "none took long"
            # Whose turn does not come keeps its stacks.
            await until(lambda: sum(bool(process.poll()) for process in large) == 2)
            (spool / layout.CORES / "socket").unlink()
        for process in large:
            assert await asyncio.to_thread(process.wait, 60) == -signal.SIGSEGV
        records = [await recorder.captured(process.pid) for process in large]
        notes = [record.model_dump_json() for record in records]
        assert sum("too many large cores at once" in note for note in notes) == 2
        recorder.stop()


# A page that can be read neither here nor there.
_REFUSED = """
import os
file = os.memfd_create("empty")
os.ftruncate(file, 4096)
import mmap
refused = mmap.mmap(file, 4096, flags=mmap.MAP_SHARED, prot=0)
os.ftruncate(file, 0)
"""


async def test_page_that_is_refused_brings_no_large_core_by_the_stream(
    recorder_with: MakeRecorder,
) -> None:
    """Whose stacks alone are wanted takes no turn."""
    recorder = recorder_with(recorder_core="stacks")
    await recorder.start()

    pid, _ = await asyncio.to_thread(crash, "/usr/bin/python3", "-c", _REFUSED + _LARGE)

    record = await recorder.captured(pid)
    assert 0 < record.files[recorder.file(pid, "core").name].size < turns.LARGE
    assert "by the kernel's stream" not in recorder.log


async def test_disk_has_room_where_the_stacks_alone_are_wanted(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 48) as disk:
        spool, http = disk.place / "spool", f"127.0.0.1:{free_port()}"
        recorder = recorder_with(spool=spool, recorder_core="stacks", recorder_http=http)
        recorder.spool = spool
        await recorder.start()

        pid, _ = await asyncio.to_thread(crash, "/usr/bin/python3", "-c", _LARGE)

        assert (await recorder.captured(pid)).state == "complete"
        assert "spool" not in _faults(http)


def _faults(http: str) -> dict[str, str]:
    try:
        with urlopen(f"http://{http}/healthz") as answer:
            told: dict[str, str] = json.load(answer)["faults"]
    except HTTPError as ill:
        told = json.load(ill)["faults"]
    return told


async def test_few_descriptors_lose_no_crash(recorder_with: MakeRecorder) -> None:
    """What finds none free waits in the backlog, held."""
    need_program("prlimit")
    recorder = recorder_with(recorder_backtrace_deadline=0.1)
    recorder.prefix = ("prlimit", "--nofile=256")
    await recorder.start()
    processes = waiting(60)

    for process in processes:
        process.send_signal(signal.SIGSEGV)
    for process in processes:
        await asyncio.to_thread(process.communicate, timeout=60)

    for process in processes:
        assert process.returncode == -signal.SIGSEGV
        record = await recorder.captured(process.pid)
        assert not any(file.truncated for file in record.files.values())
    assert "few descriptors" in recorder.log
    assert "Too many open files" not in recorder.log
