"""A core over its limit keeps the stacks first, tells the truth, and opens in a debugger."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.recorder.conftest import MakeRecorder
from tests.recorder.test_capture import gdb
from tests.support.crashers import crasher
from tests.support.recorder import RecorderService, crash
from tests.support.requirements import need_program

MIB = 1024 * 1024

# 60 TiB reserved, a page touched here and there.
RESERVING = """
import ctypes, mmap
memory = mmap.mmap(-1, 60 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
for place in range(0, 60 << 40, 1 << 40):
    memory[place : place + 8] = b"touched!"
ctypes.string_at(0)
"""


# Holes of shared memory, and of a file in memory that is mapped privately: to read is to fill.
SHARING = """
import ctypes, mmap, os
shared = mmap.mmap(-1, 1 << 40, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | 0x4000)
file = os.memfd_create("holes")
os.ftruncate(file, 1 << 40)
for place in range(0, 1 << 40, 1 << 36):
    shared[place : place + 8] = b"touched!"
    os.pwrite(file, b"touched!", place)
private = mmap.mmap(file, 1 << 40, flags=mmap.MAP_PRIVATE | 0x4000)
private[(1 << 30) + 5 : (1 << 30) + 13] = b"changed!"
ctypes.string_at(0)
"""


async def core_of(recorder: RecorderService, *command: str | Path) -> tuple[Path, str | None]:
    """Crash a program; return its core and what the record says is wrong with it."""
    await recorder.start()
    pid, _ = crash(*command)
    record = await recorder.captured(pid)
    core = recorder.file(pid, "core")
    assert record.files[core.name].size == core.stat().st_size
    return core, record.files[core.name].note


def loads(core: Path) -> list[tuple[int, int, int, int]]:
    """Return offset, address, size in the file and in memory of each piece, as readelf sees it."""
    need_program("readelf")
    text = subprocess.run(
        ["readelf", "-lW", core], check=True, capture_output=True, text=True
    ).stdout
    found = re.findall(r"LOAD +0x(\w+) 0x(\w+) 0x\w+ 0x(\w+) 0x(\w+)", text)
    return [tuple(int(field, 16) for field in row) for row in found]  # type: ignore[misc]


async def test_core_over_its_limit_keeps_stacks_and_small_mappings(
    recorder_with: MakeRecorder,
) -> None:
    limit = 12 * MIB
    program = crasher("many_mappings")

    core, note = await core_of(recorder_with(recorder_max_core_bytes=limit), program, "100")

    assert 10 * MIB < core.stat().st_size <= limit
    missing = re.match(r"(\d+) bytes of memory were left out", note or "")
    assert missing is not None
    assert 80 * MIB < int(missing[1]) < 100 * MIB
    shown = gdb(program, core, "bt", "frame 1", "p count", "p/x closed[4096]")
    assert "crash_here" in shown
    assert "main (count=2" in shown
    assert "$1 = 2" in shown
    assert "Cannot access" not in shown


async def test_what_is_kept_is_what_the_whole_core_has(recorder_with: MakeRecorder) -> None:
    # The same program twice, at the same addresses.
    program = ("setarch", "-R", crasher("many_mappings"), "30")
    need_program("setarch")
    first = recorder_with()
    whole, note = await core_of(first, *program)
    assert note is None
    first.stop()
    content = {address: (offset, size) for offset, address, size, _ in loads(whole)}
    copy = whole.read_bytes()

    reduced, _ = await core_of(recorder_with(recorder_max_core_bytes=20 * MIB), *program)

    compared = differing = 0
    raw = reduced.read_bytes()
    for offset, address, size, _ in loads(reduced):
        start = max((one for one in content if one <= address), default=None)
        if not size or start is None or address + size > start + content[start][1]:
            continue
        place = content[start][0] + address - start
        compared += size
        pages = range(0, size, 4096)
        differing += sum(
            raw[offset + at : offset + at + 4096] != copy[place + at : place + at + 4096]
            for at in pages
        )
    # Stack, clock and random bytes differ between two runs; the filled memory does not.
    assert compared > 15 * MIB
    assert differing < 40


async def test_stacks_alone_are_enough_for_every_backtrace(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with(recorder_core="stacks")

    core, note = await core_of(recorder, crasher("threads"))

    assert core.stat().st_size < 2 * MIB
    assert "only the stacks" in (note or "")
    shown = gdb(crasher("threads"), core, "thread apply all bt")
    assert "crash_here" in shown
    pid = int(core.parent.name)
    backtrace = recorder.file(pid, "backtrace").read_text()
    assert "crash_here" in backtrace
    assert backtrace.count("--- thread") >= 2
    waiting = backtrace.split("--- thread")[-1]
    assert "libc.so" in waiting, "frames in libraries have no names"
    assert "start_thread" in waiting
    assert "main" in shown, "the stacks are not there"


async def test_reserved_memory_does_not_count(recorder_with: MakeRecorder) -> None:
    core, note = await core_of(recorder_with(), "/usr/bin/python3", "-c", RESERVING)

    assert note is None
    assert core.stat().st_size < 64 * MIB
    assert core.read_bytes().count(b"touched!") >= 60


async def test_holes_of_shared_memory_are_not_filled(recorder_with: MakeRecorder) -> None:
    core, note = await core_of(recorder_with(), "/usr/bin/python3", "-c", SHARING)

    assert note is None
    assert core.stat().st_size < 64 * MIB
    content = core.read_bytes()
    assert content.count(b"touched!") >= 32
    assert content.count(b"changed!") >= 1


@pytest.mark.parametrize("limit", [1, 3000, 60_000])
async def test_limit_below_the_notes_is_kept(recorder_with: MakeRecorder, limit: int) -> None:
    core, note = await core_of(
        recorder_with(recorder_max_core_bytes=limit), crasher("null_pointer")
    )

    assert core.stat().st_size <= limit
    assert note
