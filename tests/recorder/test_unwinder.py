"""The unwinding worker gives an answer or dies alone, and holds no rights."""

import gzip
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from services.recorder.core import core_head
from services.recorder.modules import Module
from services.recorder.unwinding import unwinder
from services.recorder.unwinding.backtrace import Backtrace
from services.recorder.unwinding.unwind_process import Forked, Server
from tests.recorder.test_core_head import core as make_core
from tests.recorder.test_core_head import prstatus, siginfo
from tests.support.fuse import StandingStill
from tests.support.requirements import need_root
from tests.support.wait import until


@pytest.fixture
def core(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "core", os.O_RDWR | os.O_CREAT, 0o600)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF",
        os.urandom(100_000),
        make_core(prstatus(11, 77) + siginfo(11, 1, 0)),
        make_core(b"\xff" * 4096),
        make_core(prstatus(11, 77), memory=1 << 62),
    ],
    ids=["empty", "magic", "random", "without memory", "bad notes", "lying size"],
)
def test_garbage_is_an_answer(core: int, content: bytes) -> None:
    os.write(core, content)

    trace = unwinder.unwind(core, (), 20)

    assert trace.fault is not None or not any(thread.frames for thread in trace.threads)


# Of Linux 6.1 on a processor with pointer authentication, and tests/support/crashers/null_pointer.c
# built for it with -g -mbranch-protection=pac-ret+leaf -nostdlib -static -Wl,-e,main.
ARM64 = Path(__file__).with_name("arm64")
STORE = bytes.fromhex("010000b9")


def test_signed_return_addresses_of_arm64_are_followed(core: int) -> None:
    os.write(core, gzip.decompress((ARM64 / "core.gz").read_bytes()))
    os.lseek(core, 0, os.SEEK_SET)
    head = core_head.read(lambda size: os.read(core, size))
    assert head.registers["x30"] >> 48  # signed: no address that user space has

    with (ARM64 / "null_pointer").open("rb") as program:
        module = Module("/null_pointer", 0x400000, 0x401000, program.fileno())
        trace = unwinder.unwind(core, (module,), 60, head, STORE)

    (thread,) = trace.threads
    told = [(frame.symbol, frame.source) for frame in thread.frames]
    assert told == [("crash_here", "./null_pointer.c:2"), ("main", "./null_pointer.c:5")]
    assert trace.instruction is not None
    assert trace.instruction.text == "str w1, [x0]"
    assert [(one.access, one.address) for one in trace.instruction.touched] == [("write", 0)]


def test_worker_s_answer_is_not_believed(core: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, within, fault in (
        ("print('{\"threads\": 1}')", 60, "the worker's answer has 1 faults"),
        ("import os; os.abort()", 60, "the worker died: SIGABRT"),
        ("while True: print('x' * 1000000)", 60, "not done within 60 s"),  # it says too much
        ("import sys, time; sys.stdin.close(); time.sleep(600)", 1, "not done within 1 s"),
    ):
        monkeypatch.setattr(unwinder, "_COMMAND", (sys.executable, "-c", program))

        assert unwinder.unwind(core, (), within).fault == fault


def test_worker_cannot_change_the_core(core: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.write(core, b"evidence")
    program = """
import json, os, sys
core = json.load(sys.stdin)["core"]
try:
    os.pwrite(core, b"x", 0)
except OSError as error:
    print(json.dumps({"fault": f"{os.pread(core, 8, 0)} {error.strerror}"}))
"""
    monkeypatch.setattr(unwinder, "_COMMAND", (sys.executable, "-c", program))

    assert unwinder.unwind(core, (), 10).fault == "b'evidence' Bad file descriptor"


def test_file_of_which_a_read_never_ends_keeps_the_worker_alone(core: int, tmp_path: Path) -> None:
    need_root()
    os.write(core, make_core(prstatus(11, 77) + siginfo(11, 1, 0)))
    told: list[Backtrace] = []

    with StandingStill(tmp_path / "fuse", Path("/bin/true")) as served:
        file = os.open(served.program, os.O_RDONLY)
        served.stand_still()
        module = Module("/program", 0x400000, 0x401000, file)
        waiting = Thread(target=lambda: told.append(unwinder.unwind(core, (module,), 1)))
        waiting.start()
        waiting.join(30)
        assert [one.fault for one in told] == ["not done within 1 s"]
    waiting.join()
    with suppress(OSError):  # nobody serves it any more
        os.close(file)


def test_no_worker_is_started_without_time(core: int) -> None:
    assert unwinder.unwind(core, (), 0.1).fault == "there was no time for it"


def test_worker_gives_up_all_rights() -> None:
    need_root()
    program = """
import os
from services.recorder.unwinding.unwind_worker import give_up_rights
give_up_rights(10)
print(os.getresuid(), os.getresgid(), os.getgroups())
status = dict(line.split(":", 1) for line in open("/proc/thread-self/status"))
print(int(status["CapEff"], 16), int(status["CapPrm"], 16), status["NoNewPrivs"].strip())
print(sum(1 for line in open("/proc/net/dev")) - 2)
for act in (os.fork, lambda: os.write(os.memfd_create("x"), b"x"), lambda: os.setuid(0)):
    try:
        act()
        print("could", act)
    except OSError:
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20
    )

    assert done.stdout.splitlines() == [
        "(65534, 65534, 65534) (65534, 65534, 65534) []",
        "0 0 1",
        "1",
        *["refused"] * 3,
    ], done.stderr


@pytest.fixture
def server() -> Iterator[Server]:
    need_root()
    made = Server()
    made.start()
    yield made
    made.stop()


def test_forked_worker_answers_as_a_started_one(core: int, server: Server) -> None:
    os.write(core, make_core(prstatus(11, 77) + siginfo(11, 1, 0)))
    told = unwinder.unwind(core, (), 60)

    for _ in range(3):
        assert unwinder.unwind(core, (), 60, server=server) == told


def test_forked_worker_is_killed_when_it_takes_too_long(core: int, server: Server) -> None:
    worker = server.fork([core], 60)
    assert worker is not None
    assert worker.wait(0.1) is None  # it waits for its request
    worker.end()

    another = server.fork([core], 60)
    assert another is not None
    os.write(another.requests, b"no request at all")
    another.no_more_requests()
    assert os.read(another.answers, 1) == b""
    assert another.wait(60) == 1
    another.end()


async def test_forked_worker_sees_nothing_of_others(
    core: int, server: Server, tmp_path: Path
) -> None:
    """The files of one crash are no business of whoever takes over the worker of another."""
    others = [server.fork([core], 60) for _ in range(2)]
    with (tmp_path / "own").open("wb") as own:
        worker = server.fork([own.fileno()], 60)
    assert worker is not None
    pid = _pid(worker)

    def open_files() -> list[str]:
        return [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]

    # Beside its standard input, output and error.
    links = await until(lambda: links if len(links := open_files()) == 4 else None)
    assert str(tmp_path / "own") in links
    for one in (worker, *others):
        assert one is not None
        one.end()


def _pid(worker: Forked) -> int:
    info = Path(f"/proc/self/fdinfo/{worker._process}").read_text()
    return int(info.rpartition("Pid:")[2].split()[0])


def test_without_a_server_workers_are_started(core: int, server: Server) -> None:
    assert server._process is not None
    server._process.kill()
    server._process.wait()
    trace = unwinder.unwind(core, (), 60, server=server)
    assert trace.fault is not None and "worker" not in trace.fault  # it said what it saw
    assert server.fork([core], 60) is None  # not started anew for each crash
