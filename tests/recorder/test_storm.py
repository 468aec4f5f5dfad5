"""Many crashes at once."""

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from crashbus.layout import DRAFTS
from tests.recorder.conftest import MakeRecorder
from tests.recorder.test_capture import _compile
from tests.support.cgroup import pids_cgroup
from tests.support.recorder import FILES, RecorderService
from tests.support.victim import waiting
from tests.support.wait import stop, until


def memory_of(recorder: RecorderService) -> int:
    """Return the memory of a recorder and all its workers in bytes, shared pages in parts."""
    total = 0
    for pid in (recorder.pid, *recorder.children()):
        with suppress(OSError, ValueError, StopIteration):  # a worker ends
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += int(next(line.split()[1] for line in lines if line.startswith("Pss:")))
    return total * 1024


async def test_storm_of_two_hundred_crashes_at_once_is_captured_in_constant_memory(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with(
        recorder_loop_burst=0,
        recorder_debug_directory="/nonexistent",  # that of the C library costs 15 MiB a backtrace
        recorder_backtraces=2,
    )
    await recorder.start()
    processes = waiting(200)

    for process in processes:
        process.send_signal(signal.SIGSEGV)
    most = await most_memory_until(recorder, lambda: finished(recorder) == len(processes))

    for process in processes:
        process.communicate()
        assert process.returncode == -signal.SIGSEGV
        record = recorder.record(process.pid)
        assert record is not None and len(record.files) == len(FILES)
        assert not any(file.truncated for file in record.files.values())
    assert most < 150 << 20, f"{most >> 20} MiB"


async def most_memory_until(recorder: RecorderService, is_over: Callable[[], bool]) -> int:
    """Return the most memory that a recorder and its workers had until something is so."""
    most = 0
    while not is_over():
        most = max(most, await asyncio.to_thread(memory_of, recorder))
        await asyncio.sleep(0.05)
    return most


def finished(recorder: RecorderService) -> int:
    """Tell how many crashes have all their files: no draft of them is there any more."""
    begun = {path.parent.name for path in recorder.spool.glob("*/capture_*")}
    return len(begun - {path.name.partition("-")[0] for path in recorder.spool.glob(f"{DRAFTS}/*")})


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_three_hundred_crashes_that_wait_for_two_workers_are_all_captured(
    recorder_with: MakeRecorder, mechanism: str
) -> None:
    """They wait in the socket's backlog while nobody takes them at all."""
    recorder = recorder_with(
        recorder_mechanism=mechanism,
        recorder_captures=2,
        recorder_loop_burst=0,
        recorder_backtrace_deadline=0.1,
        recorder_watchdog_deadline=60,
        recorder_stall_deadline=60,
    )
    await recorder.start()
    processes = waiting(300)
    await stop(recorder.pid)
    try:
        for process in processes:
            process.send_signal(signal.SIGSEGV)
        await until(lambda: all(is_dumping(process.pid) for process in processes))
    finally:
        os.kill(recorder.pid, signal.SIGCONT)

    for process in processes:
        await asyncio.to_thread(process.communicate)
        assert process.returncode == -signal.SIGSEGV
    records = [await recorder.captured(process.pid) for process in processes]
    for record in records:
        assert len(record.files) == len(FILES)
        assert not any(file.truncated for file in record.files.values())
    assert len({record.crash_id for record in records}) == 300


def is_dumping(pid: int) -> bool:
    return "CoreDumping:\t1" in Path(f"/proc/{pid}/status").read_text()


# Forks and crashes in a tree, until so many have crashed; prints how many did. Orphans come to
# the first process, which waits for each.
_FORK_BOMB = """
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
enum { MOST = 150 };
int main(void) {
    int *begun = mmap(0, sizeof *begun, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int status, died = 0, wrong = 0;
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    if (fork() == 0) {
        for (;;) {
            if (__atomic_add_fetch(begun, 1, __ATOMIC_RELAXED) > MOST) _exit(0);
            if (fork() == 0) continue;
            fork();
            *(volatile int *)0 = 1;
        }
    }
    while (wait(&status) > 0)
        if (WIFSIGNALED(status)) { if (WTERMSIG(status) == SIGSEGV) died++; else wrong++; }
    printf("%d %d\\n", died, wrong);
}
"""


async def test_fork_bomb_of_crashing_processes_is_captured_or_counted(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    program = _compile(tmp_path / "bomb", _FORK_BOMB)
    recorder = recorder_with(recorder_backtrace_deadline=0.1)
    await recorder.start()
    with pids_cgroup(400) as group:
        bomb = await asyncio.create_subprocess_exec(
            *("sh", "-c", 'echo $$ > "$1/cgroup.procs" && exec "$2"', "sh", group, program),
            stdout=asyncio.subprocess.PIPE,
        )
        said = asyncio.create_task(bomb.communicate())

        most = await most_memory_until(recorder, said.done)

        out, _ = said.result()
    died, wrong = map(int, out.split())
    assert died >= 200 and not wrong

    def captured() -> int:
        return sum(
            recorder.record(int(place.name)) is not None
            for place in recorder.spool.iterdir()
            if place.name.isdecimal()
        )

    await until(lambda: captured() == died)
    assert recorder.process is not None and recorder.process.poll() is None
    assert most < 150 << 20, f"{most >> 20} MiB"
