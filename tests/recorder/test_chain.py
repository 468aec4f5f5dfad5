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

from services.recorder.handover.chain import CannotChain, Handler
from tests.recorder.conftest import MakeRecorder
from tests.recorder.test_capture import gdb
from tests.support import core_pattern, systemd_coredump
from tests.support.crashers import HOG, crasher
from tests.support.former import Former
from tests.support.recorder import RecorderService, crash
from tests.support.requirements import lacking, need_linux, need_program
from tests.support.units import confined
from tests.support.victim import Victim, waiting
from tests.support.wait import until

SAID = "the former handler of cores had its turn"


@pytest.fixture
def former() -> Iterator[Former]:
    one = Former()
    yield one
    one.close()


async def chained(recorder_with: MakeRecorder, pattern: str, **settings: object) -> RecorderService:
    """Start a recorder after who has this core_pattern.

    It has a mount namespace of its own, and no more capabilities than its unit gives.
    """
    need_program("setpriv")
    core_pattern.set_pattern(pattern)
    recorder = recorder_with(recorder_chain="true", **settings)
    recorder.prefix = ("unshare", "--mount", *confined("recorder"))
    await recorder.start()
    return recorder


async def became(recorder: RecorderService, pid: int, result: str) -> str:
    """Wait until the log tells what became of the handler of a crash, which is captured whole."""
    record = await recorder.captured(pid)
    assert not any(file.truncated for file in record.files.values())

    def told() -> list[str]:
        return [
            line
            for line in recorder.log.splitlines()
            if SAID in line and f"crash_id={record.crash_id}" in line
        ]

    (line,) = await until(told)
    assert f"result={result}" in line
    return line


def crash_for(
    former: Former, program: str | Path | None = None, *arguments: str
) -> "subprocess.Popen[bytes]":
    """Have a program crash whose crash the handler waits for."""
    victim = Victim(Path(program or crasher("null_pointer")), *arguments)
    former.wait_for(victim.pid)
    return victim.go().process


async def ended(process: "subprocess.Popen[bytes]") -> int:
    """Wait until a process is not held any more; return the signal that it died of."""
    await asyncio.to_thread(process.communicate, timeout=60)
    return -process.returncode


async def kept_by_kernel(former: Former, tmp_path: Path) -> tuple[str, Path, dict[str, Any]]:
    """Have a program crash for a handler that the kernel starts.

    Its name has spaces, and stays one argument.

    Returns:
        The handler's core_pattern, the program, and what the handler saw.
    """
    pattern = former.pattern("keeps", "%P %u %g -s%s  %c %h %e %E %i %I %d %F %% f%f %")
    core_pattern.set_pattern(pattern)
    program = Path(shutil.copy(crasher("null_pointer"), tmp_path / "a b %P"))
    first = crash_for(former, program)
    kept = await former.kept(first.pid)
    await ended(first)
    return pattern, program, _same(kept, first.pid)


async def test_handler_is_started_just_as_the_kernel_starts_it(
    recorder_with: MakeRecorder, former: Former, tmp_path: Path
) -> None:
    """With every template of core(5), and in the same namespaces, whatever the recorder's are."""
    pattern, program, by_kernel = await kept_by_kernel(former, tmp_path)
    recorder = await chained(recorder_with, pattern)

    second = crash_for(former, program)
    by_us = await former.kept(second.pid)

    assert await ended(second) == signal.SIGSEGV
    await became(recorder, second.pid, "done")
    assert _same(by_us, second.pid) == by_kernel
    assert by_us["arguments"][2] == str(second.pid)
    assert "a b %P" in by_us["arguments"]
    assert by_us["executable"] == str(program)
    core = former.core(second.pid)
    assert core.read_bytes() == recorder.file(second.pid, "core").read_bytes()
    assert "crash_here" in gdb(program, core, "bt")
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
    process = crash_for(former, *HOG, "8")

    assert await ended(process) == signal.SIGSEGV

    assert why in await became(recorder, process.pid, result)


async def test_handler_that_hangs_is_killed_with_its_children(
    recorder_with: MakeRecorder, former: Former
) -> None:
    recorder = await chained(recorder_with, former.pattern("hangs"), recorder_chain_deadline=3)
    process = crash_for(former)

    assert await ended(process) == signal.SIGSEGV

    said = await became(recorder, process.pid, "timed_out")
    assert "CRASHBUS_RECORDER_CHAIN_DEADLINE" in said
    await until(lambda: not former.processes(process.pid))


async def test_pipe_helper_that_is_stopped_holds_nobody(
    recorder_with: MakeRecorder, former: Former
) -> None:
    """The handler itself does that: it runs as root."""
    recorder = await chained(recorder_with, former.pattern("stops"), recorder_chain_deadline=3)
    process = crash_for(former)

    assert await ended(process) == signal.SIGSEGV

    await became(recorder, process.pid, "timed_out")


@pytest.mark.parametrize("end", [RecorderService.stop, RecorderService.kill])
async def test_capture_does_not_wait_for_the_handler_nor_the_process_for_a_recorder_that_is_gone(
    recorder_with: MakeRecorder, former: Former, end: Callable[[RecorderService], object]
) -> None:
    recorder = await chained(recorder_with, former.pattern("hangs"), recorder_chain_deadline=600)
    process = crash_for(former)
    assert await former.kept(process.pid)
    await recorder.captured(process.pid)
    assert process.poll() is None
    assert len(former.processes(process.pid)) == 2

    await asyncio.to_thread(end, recorder)

    assert await ended(process) == signal.SIGSEGV


async def test_child_of_a_handler_that_keeps_its_input_holds_nobody(
    recorder_with: MakeRecorder, former: Former
) -> None:
    """A handler may leave work to a child; it is not killed then."""
    recorder = await chained(recorder_with, former.pattern("forks"))
    process = crash_for(former)

    assert await ended(process) == signal.SIGSEGV

    await became(recorder, process.pid, "done")
    assert [await former.kept(process.pid)] == former.processes(process.pid)


async def test_handler_that_is_missing_is_told(recorder_with: MakeRecorder) -> None:
    recorder = await chained(recorder_with, "|/nowhere/handler %P")

    pid, number = await asyncio.to_thread(crash, crasher("null_pointer"))

    assert number == signal.SIGSEGV
    said = await became(recorder, pid, "failed")
    assert "cannot be started: No such file or directory" in said


async def test_core_that_nobody_may_have_goes_to_no_handler(
    recorder_with: MakeRecorder, former: Former
) -> None:
    rule = f"executable={crasher('null_pointer')}"
    recorder = await chained(recorder_with, former.pattern("keeps"), recorder_core_off=rule)
    process = crash_for(former)

    assert await ended(process) == signal.SIGSEGV

    assert "CRASHBUS_RECORDER_CORE_OFF" in await became(recorder, process.pid, "skipped")
    assert not former.core(process.pid).exists()


async def test_handler_is_remembered_by_a_recorder_after_a_killed_one(
    recorder_with: MakeRecorder, former: Former
) -> None:
    recorder = await chained(recorder_with, former.pattern("keeps"))
    recorder.kill()

    await recorder.start()
    process = crash_for(former)

    assert (await former.kept(process.pid))["arguments"][2] == str(process.pid)
    assert await ended(process) == signal.SIGSEGV
    await became(recorder, process.pid, "done")


async def test_systemd_coredump_stores_its_own_core(
    recorder_with: MakeRecorder, former: Former
) -> None:
    if not systemd_coredump.available():
        lacking("needs Debian's systemd-coredump, see deploy/setup.sh, and no systemd")
    program, core = crasher("null_pointer"), former.place / "core"
    with systemd_coredump.systemd_coredump(former.place) as pattern:
        recorder = await chained(recorder_with, pattern)

        pid, number = await asyncio.to_thread(crash, program)

        assert number == signal.SIGSEGV
        await became(recorder, pid, "done")
        (stored,) = await until(lambda: list(systemd_coredump.STORED.glob(f"core.*.{pid}.*.zst")))
        with stored.open("rb") as packed, core.open("wb") as unpacked:
            zstandard.ZstdDecompressor().copy_stream(packed, unpacked)
    assert "crash_here" in gdb(program, core, "bt")
    assert core.read_bytes() == recorder.file(pid, "core").read_bytes()


async def test_storm_goes_to_the_handler_a_few_at_a_time(
    recorder_with: MakeRecorder, former: Former
) -> None:
    """Forty at once, of which none hangs, and each is captured and told."""
    recorder = await chained(recorder_with, former.pattern("ends"), recorder_backtrace_deadline=0.1)
    processes = waiting(40)

    for process in processes:
        process.send_signal(signal.SIGSEGV)

    for process in processes:
        assert await ended(process) == signal.SIGSEGV
        await became(recorder, process.pid, "done")


async def test_without_a_handler_nothing_is_chained(recorder_with: MakeRecorder) -> None:
    need_linux((6, 16), "the coredump socket")
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with(recorder_chain="true")

    await recorder.start()

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


async def without_a_recorder(
    recorder_with: MakeRecorder, pattern: str, **settings: object
) -> RecorderService:
    """Start a recorder that chains and kill it: its pipe helper is left alone."""
    recorder = await chained(recorder_with, pattern, **settings)
    recorder.kill()
    await until(lambda: "the pipe helper keeps crashes" in recorder.log)
    return recorder


async def test_handler_gets_what_the_helper_keeps_while_there_is_no_recorder(
    recorder_with: MakeRecorder, former: Former, tmp_path: Path
) -> None:
    pattern, program, by_kernel = await kept_by_kernel(former, tmp_path)
    recorder = await without_a_recorder(recorder_with, pattern)

    second = crash_for(former, program)
    by_us = await former.kept(second.pid)

    assert await ended(second) == signal.SIGSEGV
    assert _same(by_us, second.pid) == by_kernel
    assert by_us["executable"] == str(program)  # its /proc was still there
    await recorder.start()
    await recorder.captured(second.pid)
    core = former.core(second.pid)
    assert core.read_bytes() == recorder.file(second.pid, "core").read_bytes()
    assert recorder.stop() == 0
    assert core_pattern.current() == pattern


@pytest.mark.parametrize("how", ["hangs", "dies"])
async def test_handler_that_misbehaves_holds_nobody_while_there_is_no_recorder(
    recorder_with: MakeRecorder, former: Former, how: str
) -> None:
    recorder = await without_a_recorder(
        recorder_with, former.pattern(how), recorder_chain_deadline=1
    )

    process = crash_for(former)

    assert await ended(process) == signal.SIGSEGV
    await until(lambda: not former.processes(process.pid))
    await recorder.start()
    record = await recorder.captured(process.pid)
    assert not any(file.truncated for file in record.files.values())


async def test_handler_gets_no_memory_that_nobody_may_keep_while_there_is_no_recorder(
    recorder_with: MakeRecorder, former: Former
) -> None:
    recorder = await without_a_recorder(
        recorder_with, former.pattern("keeps"), recorder_core_off="executable=*/null_pointer"
    )

    process = crash_for(former)

    assert await ended(process) == signal.SIGSEGV
    await recorder.start()
    await recorder.captured(process.pid)
    assert not (former.place / str(process.pid) / "kept").exists()
