"""A snapshot of a living process: like a crash, but that it lives on and notices nothing."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from crashbus.capture import CaptureRecord, read
from tests.recorder.test_capture import _compile, gdb
from tests.support.requirements import lacking, need_root
from tests.support.wait import until

_SOURCE = """
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
volatile long beats;
char heap_like[1 << 20];
static void *deep_inside(void *argument) { for (;;) { beats++; usleep(1000); } }
int main(void) {
    pthread_t thread;
    for (int i = 0; i < sizeof heap_like; i++) heap_like[i] = 'k';
    for (int i = 0; i < 5; i++) pthread_create(&thread, 0, deep_inside, 0);
    puts("ready");
    fflush(stdout);
    for (;;) { char c; if (read(0, &c, 1) == 1) { printf("%ld\\n", beats); fflush(stdout); } }
}
"""


class Living:
    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.pid = self.process.pid

    def beats(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"x")
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_root()
    return _compile(tmp_path_factory.mktemp("live") / "living", _SOURCE)


@pytest.fixture
def living(program: Path) -> Iterator[Living]:
    one = Living(program)
    yield one
    one.process.kill()
    one.process.communicate()


def snapshot(
    tmp_path: Path, pid: int, *arguments: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    done = subprocess.run(
        [sys.executable, "-m", "crashbus", "snapshot", str(pid), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ
        | {"CRASHBUS_SPOOL": str(tmp_path / "spool"), "CRASHBUS_STATE": str(tmp_path / "state")},
    )
    return done, tmp_path / "spool" / str(pid)


def record_of(directory: Path) -> CaptureRecord:
    (path,) = directory.glob("capture_*")
    with path.open("rb") as file:
        return read(file.fileno())


def test_snapshot_shows_every_thread_and_the_process_lives_on(
    tmp_path: Path, living: Living
) -> None:
    done, directory = snapshot(tmp_path, living.pid)

    assert done.returncode == 0, done.stderr
    record = record_of(directory)
    assert record.crash_id in done.stdout
    assert (record.state, record.signal, record.signal_name) == ("complete", 0, "none")
    (backtrace,) = directory.glob("backtrace_*.json")
    found = json.loads(backtrace.read_bytes())
    assert found["fault"] is None
    assert len(found["threads"]) == 6
    symbols = [[frame["symbol"] for frame in thread["frames"]] for thread in found["threads"]]
    assert "main" in symbols[0]
    assert all("deep_inside" in names for names in symbols[1:])
    (shown,) = directory.glob("snapshot_*")
    assert json.loads(shown.read_bytes())["Pid"] == living.pid
    assert json.loads(shown.read_bytes())["HoldMilliseconds"] > 0
    first = living.beats()
    assert living.beats() >= first, "it does not run any more"
    status = Path(f"/proc/{living.pid}/status").read_text()
    assert "TracerPid:\t0" in status
    assert "State:\tT" not in status


def test_core_of_a_living_process_opens_in_gdb(
    tmp_path: Path, living: Living, program: Path
) -> None:
    done, directory = snapshot(tmp_path, living.pid, "--core")

    assert done.returncode == 0, done.stderr
    (core,) = directory.glob("core_*")
    assert not record_of(directory).files[core.name].truncated
    shown = gdb(program, core, "thread apply all bt", "p heap_like[1000]", "info sharedlibrary")
    assert shown.count("deep_inside") >= 5
    assert re.search(r"#\d+ .* main \(\)", shown)
    assert "107 'k'" in shown
    assert "libc.so" in shown


def test_process_whose_name_has_what_looks_like_a_line_is_shown(
    tmp_path: Path, program: Path
) -> None:
    odd = Living(shutil.copy(program, tmp_path / "x\rNSpid:\tq-1 a b c d e"))
    try:
        done, directory = snapshot(tmp_path, odd.pid)
    finally:
        odd.process.kill()
        odd.process.communicate()

    assert done.returncode == 0, done.stderr
    assert record_of(directory).process.comm == "x\rNSpid:\tq-1 a "


def test_signal_that_comes_meanwhile_is_delivered(tmp_path: Path, program: Path) -> None:
    living = Living(program)
    stopped = threading.Event()

    def send() -> None:
        while not stopped.is_set():
            os.kill(living.pid, signal.SIGWINCH)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        done, _ = snapshot(tmp_path, living.pid)
    finally:
        stopped.set()
        sender.join()
    assert done.returncode == 0, done.stderr
    living.process.terminate()
    assert living.process.wait(60) == -signal.SIGTERM
    living.process.communicate()


async def test_snapshot_that_is_killed_frees_the_process(tmp_path: Path, living: Living) -> None:
    taking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "crashbus", "snapshot", str(living.pid), "--core"),
        env=os.environ
        | {"CRASHBUS_SPOOL": str(tmp_path / "spool"), "CRASHBUS_STATE": str(tmp_path / "state")},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    status = Path(f"/proc/{living.pid}/status")
    await until(lambda: f"TracerPid:\t{taking.pid}" in status.read_text(), every=0.001)
    taking.kill()
    await taking.wait()

    await until(lambda: "TracerPid:\t0" in status.read_text())
    first = living.beats()
    assert living.beats() >= first


def test_process_that_was_stopped_stays_stopped(tmp_path: Path, living: Living) -> None:
    os.kill(living.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, living.pid, os.WSTOPPED | os.WNOWAIT)

    done, _ = snapshot(tmp_path, living.pid)

    assert done.returncode == 0, done.stderr
    assert "State:\tT (stopped)" in Path(f"/proc/{living.pid}/status").read_text()
    os.kill(living.pid, signal.SIGCONT)
    assert living.beats() >= 0


@pytest.mark.parametrize(
    ("pid", "says"),
    [("4194304", "there is no process 4194304; ps"), ("2", "process 2 cannot be stopped")],
)
def test_what_cannot_be_taken_is_told(tmp_path: Path, pid: str, says: str) -> None:
    need_root()
    if pid == "2" and "kthreadd" not in Path("/proc/2/comm").read_text():
        lacking("needs the host's PID namespace, in which PID 2 is a kernel thread")

    done, _ = snapshot(tmp_path, int(pid))

    assert done.returncode == 1
    assert done.stderr.startswith("crashbus: ")
    assert says in done.stderr


def test_traced_process_is_told(tmp_path: Path, living: Living) -> None:
    tracer = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys; from services.recorder.live import LiveHold\n"
            "hold = LiveHold(int(sys.argv[1])); print('held', flush=True); sys.stdin.read()",
            str(living.pid),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert tracer.stdout is not None
    tracer.stdout.readline()

    done, _ = snapshot(tmp_path, living.pid)

    tracer.communicate(b"")
    assert done.returncode == 1
    assert "end the debugger" in done.stderr
