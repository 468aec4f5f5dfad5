"""Who had core_pattern before the recorder still gets its cores, if the user asks for it."""

import asyncio
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from services.recorder.chain import CannotChain, Handler
from tests.recorder.conftest import MakeRecorder
from tests.recorder.test_capture import gdb
from tests.support import core_pattern, systemd_coredump
from tests.support.crashers import crasher
from tests.support.former import Former
from tests.support.recorder import RecorderService, crash
from tests.support.requirements import lacking
from tests.support.victim import waiting
from tests.support.wait import until

SAID = "the former handler of cores had its turn"


@pytest.fixture
def former() -> Iterator[Former]:
    one = Former()
    yield one
    one.close()


async def chained(recorder_with: MakeRecorder, pattern: str, **settings: object) -> RecorderService:
    """Start a recorder after who has this core_pattern."""
    core_pattern.set_pattern(pattern)
    recorder = recorder_with(recorder_chain="true", **settings)
    await recorder.start()
    return recorder


async def became(recorder: RecorderService, result: str) -> str:
    """Wait until the log tells what became of a handler."""
    await until(lambda: SAID in recorder.log)
    line = next(line for line in recorder.log.splitlines() if SAID in line)
    assert f"result={result}" in line
    return line


def whole(recorder: RecorderService, pid: int) -> bool:
    record = recorder.record(pid)
    return record is not None and not any(file.truncated for file in record.files.values())


async def test_handler_is_started_just_as_the_kernel_starts_it(
    recorder_with: MakeRecorder, former: Former, tmp_path: Path
) -> None:
    """With every template of core(5); %e has spaces, and stays one argument."""
    pattern = former.pattern("keeps", "%P %u %g -s%s  %c %h %e %E %i %I %d %F %% f%f %")
    core_pattern.set_pattern(pattern)
    program = Path(shutil.copy(crasher("null_pointer"), tmp_path / "a b %P"))
    first, _ = crash(program)
    by_kernel = await former.kept()
    recorder = await chained(recorder_with, pattern)

    second, number = crash(program)
    by_us = await former.kept()

    assert number == signal.SIGSEGV
    assert await became(recorder, "done")
    assert _same(by_us, second) == _same(by_kernel, first)
    assert by_us["arguments"][2] == str(second)
    assert "a b %P" in by_us["arguments"]
    assert by_us["executable"] == str(program)
    await recorder.captured(second)
    assert whole(recorder, second)
    assert former.core.read_bytes() == recorder.file(second, "core").read_bytes()
    assert "crash_here" in gdb(program, former.core, "bt")
    assert recorder.stop() == 0
    assert core_pattern.current() == pattern


def _same(kept: dict[str, Any], pid: int) -> dict[str, Any]:
    """Leave out what differs from crash to crash."""
    named = ["<pid>" if one == str(pid) else one for one in kept["arguments"]]
    return kept | {"arguments": named}


@pytest.mark.parametrize(
    ("how", "result", "why"),
    [
        ("ends", "done", ""),
        ("fails", "failed", "exit 3"),
        ("dies", "failed", f"signal {signal.SIGSEGV.value}"),
    ],
)
async def test_handler_that_reads_nothing_holds_nobody(
    recorder_with: MakeRecorder, former: Former, how: str, result: str, why: str
) -> None:
    """Not even of a core that is larger than any pipe, and whatever it ends with."""
    recorder = await chained(recorder_with, former.pattern(how))
    process = subprocess.Popen([crasher("heap"), "8"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGSEGV)

    assert await asyncio.to_thread(process.wait, 60) == -signal.SIGSEGV

    assert why in await became(recorder, result)
    await recorder.captured(process.pid)
    assert whole(recorder, process.pid)


async def test_handler_that_hangs_is_killed_with_its_children(
    recorder_with: MakeRecorder, former: Former
) -> None:
    recorder = await chained(recorder_with, former.pattern("hangs"), recorder_chain_deadline=3)

    pid, number = await asyncio.to_thread(crash, crasher("null_pointer"))

    assert number == signal.SIGSEGV
    assert "CRASHBUS_RECORDER_CHAIN_DEADLINE" in await became(recorder, "timed_out")
    await until(lambda: not former.processes())
    await recorder.captured(pid)
    assert whole(recorder, pid)


@pytest.mark.parametrize("end", [RecorderService.stop, RecorderService.kill])
async def test_capture_does_not_wait_for_the_handler_nor_the_process_for_a_recorder_that_is_gone(
    recorder_with: MakeRecorder, former: Former, end: Callable[[RecorderService], object]
) -> None:
    recorder = await chained(recorder_with, former.pattern("hangs"), recorder_chain_deadline=600)
    process = subprocess.Popen([crasher("null_pointer")])
    assert await former.kept()
    await recorder.captured(process.pid)
    assert process.poll() is None
    assert len(former.processes()) == 2

    await asyncio.to_thread(end, recorder)

    assert await asyncio.to_thread(process.wait, 60) == -signal.SIGSEGV


async def test_child_of_a_handler_that_keeps_its_input_holds_nobody(
    recorder_with: MakeRecorder, former: Former
) -> None:
    """A handler may leave work to a child; it is not killed then."""
    recorder = await chained(recorder_with, former.pattern("forks"))

    pid, number = await asyncio.to_thread(crash, crasher("null_pointer"))

    assert number == signal.SIGSEGV
    await became(recorder, "done")
    assert await former.kept() == former.processes()
    await recorder.captured(pid)


async def test_handler_that_is_missing_is_told(recorder_with: MakeRecorder) -> None:
    recorder = await chained(recorder_with, "|/nowhere/handler %P")

    pid, number = crash(crasher("null_pointer"))

    assert number == signal.SIGSEGV
    assert "cannot be started: No such file or directory" in await became(recorder, "failed")
    await recorder.captured(pid)
    assert whole(recorder, pid)


async def test_core_that_nobody_may_have_goes_to_no_handler(
    recorder_with: MakeRecorder, former: Former
) -> None:
    program = crasher("null_pointer")
    recorder = await chained(
        recorder_with, former.pattern("keeps"), recorder_core_off=f"executable={program}"
    )

    pid, number = crash(program)

    assert number == signal.SIGSEGV
    assert "CRASHBUS_RECORDER_CORE_OFF" in await became(recorder, "skipped")
    await recorder.captured(pid)
    assert not former.core.exists()


async def test_handler_is_remembered_by_a_recorder_after_a_killed_one(
    recorder_with: MakeRecorder, former: Former
) -> None:
    recorder = await chained(recorder_with, former.pattern("keeps"))
    recorder.kill()

    await recorder.start()
    pid, _ = crash(crasher("null_pointer"))

    assert (await former.kept())["arguments"][2] == str(pid)
    await recorder.captured(pid)


async def test_systemd_coredump_stores_its_own_core(
    recorder_with: MakeRecorder, former: Former
) -> None:
    if not systemd_coredump.available():
        lacking("needs Debian's systemd-coredump, see deploy/setup.sh, and no systemd")
    program = crasher("null_pointer")
    with systemd_coredump.systemd_coredump(former.place) as pattern:
        recorder = await chained(recorder_with, pattern)

        pid, number = crash(program)

        assert number == signal.SIGSEGV
        await became(recorder, "done")
        (stored,) = await until(lambda: list(systemd_coredump.STORED.glob(f"core.*.{pid}.*.zst")))
        with stored.open("rb") as packed, former.core.open("wb") as core:
            zstandard.ZstdDecompressor().copy_stream(packed, core)
        stored.unlink()
    assert "crash_here" in gdb(program, former.core, "bt")
    await recorder.captured(pid)
    assert former.core.read_bytes() == recorder.file(pid, "core").read_bytes()


async def test_storm_goes_to_the_handler_a_few_at_a_time(
    recorder_with: MakeRecorder, former: Former
) -> None:
    """Forty at once, of which none hangs, and each is captured and told."""
    recorder = await chained(recorder_with, former.pattern("ends"), recorder_backtrace_deadline=0.1)
    processes = waiting(40)

    for process in processes:
        process.send_signal(signal.SIGSEGV)
    for process in processes:
        await asyncio.to_thread(process.communicate, timeout=60)

    for process in processes:
        assert process.returncode == -signal.SIGSEGV
        await recorder.captured(process.pid)
    await until(lambda: recorder.log.count(SAID) == 40)
    assert "result=failed" not in recorder.log


async def test_without_a_handler_nothing_is_chained(recorder_with: MakeRecorder) -> None:
    recorder = await chained(recorder_with, "/somewhere/core.%p")

    assert core_pattern.current().startswith("@")
    assert "there is no handler to chain" in recorder.log


async def test_socket_cannot_chain(recorder_with: MakeRecorder) -> None:
    core_pattern.set_pattern("|/bin/false %P")
    recorder = recorder_with(recorder_chain="true", recorder_mechanism="socket")

    recorder.launch()
    assert recorder.process is not None

    assert recorder.process.wait(60) == 2
    assert "set CRASHBUS_RECORDER_MECHANISM to auto or pipe" in recorder.log
    assert core_pattern.current() == "|/bin/false %P"


@pytest.mark.parametrize(
    ("pattern", "words", "templates"),
    [
        ("|/bin/h", [b"/bin/h"], "+"),
        ("|  /bin/h  a\t%p -u%u  b", [b"/bin/h", b"a", b"%p", b"-u%u", b"b"], "+ %p -u%u"),
        # The kernel drops a percent sign together with the space behind it.
        ("|/bin/h a% b 5%% %", [b"/bin/h", b"ab", b"5%%", b"%"], "+ 5%% %"),
    ],
)
def test_pattern_is_split_as_the_kernel_does(
    pattern: str, words: list[bytes], templates: str
) -> None:
    handler = Handler.parse(pattern)

    assert list(handler.words) == words
    assert handler.templates == templates


def test_order_leaves_the_kernels_arguments_to_the_helper() -> None:
    order = Handler.parse("|/bin/h a %p b").order(7)

    assert order == b"7\0/bin/h\0a\0%\0b\0"


@pytest.mark.parametrize(
    "pattern", ["", "core", "@/run/x", "|", "|h %p", "|/bin/%e", "|/var/lib/x/corepipe /run/s %P"]
)
def test_pattern_without_a_handler_is_refused(pattern: str) -> None:
    with pytest.raises(CannotChain):
        Handler.parse(pattern)
