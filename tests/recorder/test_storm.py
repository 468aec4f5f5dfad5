"""Many crashes at once."""

import asyncio
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from services.recorder.core import core_head
from tests.recorder.conftest import MakeRecorder
from tests.support.recorder import FILES, RecorderService
from tests.support.victim import waiting
from tests.support.wait import until


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_storm_of_fifty_crashes_at_once_loses_none(
    recorder_with: MakeRecorder, mechanism: str
) -> None:
    recorder = recorder_with(recorder_mechanism=mechanism, recorder_backtrace_deadline=0.1)
    await recorder.start()
    processes = waiting(50)

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


def has_whole_core(recorder: RecorderService, pid: int) -> bool:
    """Tell whether a core is there, which a small process is let go before."""
    for core in (recorder.spool / str(pid)).glob("core_*"):
        with core.open("rb") as file:
            return core_head.read(file.read).size == core.stat().st_size
    return False


async def test_storm_of_two_hundred_crashes_at_once_is_captured_in_constant_memory(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with(
        recorder_loop_burst=0,
        recorder_debug_directory="/nonexistent",  # this host may have any
    )
    await recorder.start()
    processes = waiting(200)

    for process in processes:
        process.send_signal(signal.SIGSEGV)
    most = 0
    while any(process.poll() is None for process in processes) or not finished(recorder, 10):
        most = max(most, await asyncio.to_thread(memory_of, recorder))
        await asyncio.sleep(0.05)

    for process in processes:
        process.communicate()
        assert process.returncode == -signal.SIGSEGV
        await until(partial(has_whole_core, recorder, process.pid))
    assert most < 150 << 20, f"{most >> 20} MiB"


def finished(recorder: RecorderService, count: int) -> bool:
    """Tell whether so many crashes have their backtraces."""
    return len(list(recorder.spool.glob("*/backtrace_*.json"))) >= count
