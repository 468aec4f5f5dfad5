"""A snapshot of a living process: like a crash, but that it lives on."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from crashbus import identity
from services.common.capture import CaptureRecord, read
from services.recorder.live import LiveHold
from tests.recorder.test_capture import _compile, gdb
from tests.support.requirements import lacking, need_program, need_root
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
    done, directory = snapshot(tmp_path, living.pid, "--core", "--json")

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["crash_id"], told["process"]["pid"]) == (record_of(directory).crash_id, living.pid)
    assert {Path(one) for one in told["files"]} == {
        one for one in directory.iterdir() if not one.name.startswith("capture_")
    }
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
    odd = Living(Path(shutil.copy(program, tmp_path / "x\rNSpid:\tq-1 a b c d e")))
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
    await until(lambda: "TracerPid:\t0" not in status.read_text(), every=0.001)
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


def test_thread_is_taken_for_its_process(tmp_path: Path, living: Living) -> None:
    thread = max(int(task.name) for task in Path(f"/proc/{living.pid}/task").iterdir())

    done, _ = snapshot(tmp_path, thread)

    assert done.returncode == 0, done.stderr
    assert f"{thread} is a thread: process {living.pid} is shown" in done.stderr
    assert record_of(tmp_path / "spool" / str(living.pid)).process.pid == living.pid


_FIRST_THREAD_ENDS = """
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
static pthread_t first;
static void *deep_inside(void *argument) {
    pthread_join(first, 0);
    puts("alone");
    fflush(stdout);
    for (;;) pause();
}
int main(void) {
    pthread_t thread;
    first = pthread_self();
    pthread_create(&thread, 0, deep_inside, 0);
    pthread_exit(0);
}
"""


def test_process_whose_first_thread_has_ended_is_shown(tmp_path: Path) -> None:
    need_root()
    odd = Living(_compile(tmp_path / "headless", _FIRST_THREAD_ENDS))
    try:
        done, directory = snapshot(tmp_path, odd.pid, "--core")

        assert done.returncode == 0, done.stderr
        (backtrace,) = directory.glob("backtrace_*.json")
        (thread,) = json.loads(backtrace.read_bytes())["threads"]
        assert "deep_inside" in [frame["symbol"] for frame in thread["frames"]]
        (core,) = directory.glob("core_*")
        shown = gdb(tmp_path / "headless", core, "bt")
        assert "deep_inside" in shown
        assert odd.process.poll() is None
    finally:
        odd.process.kill()
        odd.process.communicate()


def test_process_that_has_ended_is_told(tmp_path: Path) -> None:
    need_root()
    ended = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)

        done, _ = snapshot(tmp_path, ended.pid)
    finally:
        ended.wait()

    assert done.returncode == 1
    assert f"process {ended.pid} has ended, and stays until its parent" in done.stderr


_WAITER = """
#include <errno.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <unistd.h>
int main(void) {
    struct epoll_event event = {.events = EPOLLIN};
    int epoll = epoll_create1(0), interrupted = 0, n;
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    puts("ready");
    fflush(stdout);
    while ((n = epoll_wait(epoll, &event, 1, -1)) != 1)
        if (errno != EINTR) return 1;
        else interrupted++;
    printf("%d\\n", interrupted);
}
"""


def test_wait_that_any_stop_ends_is_told_to_be_interrupted_once(tmp_path: Path) -> None:
    """As docs/capture.md has it: a program that does not expect EINTR there may notice."""
    need_root()
    waiter = Living(_compile(tmp_path / "waiter", _WAITER))
    try:
        while "State:\tS" not in Path(f"/proc/{waiter.pid}/status").read_text():
            pass

        done, _ = snapshot(tmp_path, waiter.pid)
    finally:
        out, _ = waiter.process.communicate(b"x")

    assert done.returncode == 0, done.stderr
    assert out == b"1\n"


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


_SLEEPER = """
#include <pthread.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
static volatile long beats;
static void *in_uninterruptible_sleep(void *unused) {
    char c;
    if (vfork() == 0) {  /* sleeps until its child is gone, and no signal wakes it */
        while (read(0, &c, 1) != 1) ;
        _exit(0);
    }
    for (;;) { beats++; usleep(1000); }
}
int main(void) {
    pthread_t thread;
    pthread_create(&thread, 0, in_uninterruptible_sleep, 0);
    puts("ready");
    fflush(stdout);
    while (!beats) usleep(1000);
    puts("awake");
    fflush(stdout);
    for (;;) pause();
}
"""


class Sleeper(Living):
    """One of its threads sleeps so that nothing stops it, until it is woken."""

    def __init__(self, program: Path) -> None:
        super().__init__(program)
        tasks = Path(f"/proc/{self.pid}/task")
        while not (asleep := [t for t in tasks.iterdir() if "State:\tD" in _status(t)]):
            pass
        self.asleep = int(asleep[0].name)

    def wake(self) -> bytes:
        """Have that thread run on, and return what the process says when it does."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"x")
        return self.process.stdout.readline()


def _status(task: Path) -> str:
    return (task / "status").read_text()


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Sleeper]:
    need_root()
    one = Sleeper(_compile(tmp_path / "sleeper", _SLEEPER))
    yield one
    one.process.kill()
    one.process.communicate(b"x")


def test_thread_that_cannot_be_stopped_holds_the_others_for_milliseconds(
    tmp_path: Path, sleeper: Sleeper
) -> None:
    done, directory = snapshot(tmp_path, sleeper.pid)

    assert done.returncode == 0, done.stderr
    (shown,) = directory.glob("snapshot_*")
    found = json.loads(shown.read_bytes())
    assert found["HoldMilliseconds"] < 1000
    note = f"thread {sleeper.asleep} was not stopped: D (disk sleep)"
    assert note in found["Notes"] and note in record_of(directory).notes
    assert sleeper.wake() == b"awake\n"


def test_thread_that_stops_too_late_runs_on(sleeper: Sleeper) -> None:
    hold = LiveHold(sleeper.pid)
    hold.let_go()

    assert sleeper.wake() == b"awake\n"

    assert hold.notes == [f"thread {sleeper.asleep} was not stopped: D (disk sleep)"]
    hold.close()


@pytest.fixture
def open_program(program: Path) -> Iterator[Path]:
    """The program where every user reaches it."""
    with tempfile.TemporaryDirectory(prefix="cb-", dir="/tmp") as place:
        Path(place).chmod(0o755)
        yield Path(shutil.copy(program, place))


def test_process_of_another_user_in_namespaces_of_its_own_is_shown(
    tmp_path: Path, open_program: Path
) -> None:
    need_program("unshare")
    need_program("setpriv")
    outer = subprocess.Popen(
        [
            *("unshare", "--pid", "--fork", "--mount-proc", "--net", "--uts"),
            *("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"),
            open_program,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert outer.stdout is not None and outer.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text()
        done, directory = snapshot(tmp_path, pid := int(children))

        assert done.returncode == 0, done.stderr
        check_is_shown(directory, pid, uid=65534, ns_pid=1)
        assert outer.poll() is None
    finally:
        outer.kill()  # and with it PID 1 of the namespace: unshare --fork passes nothing on
        os.kill(int(children), signal.SIGKILL)
        outer.communicate()


def test_setuid_program_is_shown(tmp_path: Path, open_program: Path) -> None:
    need_program("setpriv")
    open_program.chmod(0o4755)
    one = subprocess.Popen(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", open_program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert one.stdout is not None and one.stdout.readline() == b"ready\n"
        status = Path(f"/proc/{one.pid}/status").read_text()
        assert re.search(r"Uid:\t65534\t0\t", status), "it has not become root"
        done, directory = snapshot(tmp_path, one.pid)

        assert done.returncode == 0, done.stderr
        check_is_shown(directory, one.pid, uid=65534, ns_pid=one.pid)
        assert one.poll() is None
    finally:
        one.kill()
        one.communicate()


def check_is_shown(directory: Path, pid: int, uid: int, ns_pid: int) -> None:
    record = record_of(directory)
    assert (record.process.pid, record.process.uid) == (pid, uid)
    assert record.process.ns_pid == ns_pid
    assert not any("not stopped" in note for note in record.notes)
    (backtrace,) = directory.glob("backtrace_*.json")
    threads = json.loads(backtrace.read_bytes())["threads"]
    symbols = [[frame["symbol"] for frame in thread["frames"]] for thread in threads]
    assert "main" in symbols[0]
    assert sum("deep_inside" in names for names in symbols) == 5
    assert "State:\tt" not in Path(f"/proc/{pid}/status").read_text()
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.iterdir())


def test_snapshot_and_crash_of_the_same_process_have_different_names(
    tmp_path: Path, living: Living
) -> None:
    for _ in range(2):
        done, directory = snapshot(tmp_path, living.pid)
        assert done.returncode == 0, done.stderr

    found = []
    for path in directory.glob("capture_*"):
        with path.open("rb") as file:
            found.append(read(file.fileno()).crash_id)
    boot, start = identity.boot_id(), identity.start_ticks(living.pid)
    assert len({*found, identity.crash_id(boot, living.pid, start)}) == 3
