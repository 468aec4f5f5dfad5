"""Real crashes on the real kernel become complete files, by either mechanism."""

import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from crashbus import identity, signals
from crashbus.layout import Kind, crash_file_name
from services.common.capture import CaptureRecord
from services.recorder.handover.mechanism import kernel_version
from tests.support.core_pattern import core_pattern_kept
from tests.support.crashers import FATAL, crasher
from tests.support.recorder import FILES, RecorderService, crash
from tests.support.requirements import lacking, need_program
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_APPSCOPE_FRAME = re.compile(r"#(\d+) (0x[0-9a-f]+) (?:(\S.*?) \+ (\d+)|\?)(?:  .*)?")
_APPSCOPE_KEYS = [
    *("Time", "Version", "Username", "Environment", "Arch", "Kernel"),
    *("SignalNumber", "SignalHandler", "Errno", "ProcessName", "ProcessArgs"),
    *("Pid", "Uid", "Gid", "Hostname"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["socket", "pipe"])
async def recorder(request: pytest.FixtureRequest) -> AsyncIterator[RecorderService]:
    if request.param == "pipe" and not Path("build/corepipe").exists():
        lacking("needs the pipe helper, see deploy/setup.sh")
    with core_pattern_kept():
        service = RecorderService(
            recorder_mechanism=request.param,
            redact_names="^SSN$",
            redact_forms=r"EMP-\d{6}",
        )
        try:
            await service.start()
            yield service
        finally:
            service.close()


# For what does not depend on how the core came.
by_one_mechanism = pytest.mark.parametrize("recorder", ["auto"], indirect=True)


async def capture(
    recorder: RecorderService, *command: str | Path, **options: Any
) -> tuple[int, CaptureRecord]:
    pid, _ = crash(*command, **options)
    return pid, await recorder.captured(pid)


def _compile(program: Path, source: str) -> Path:
    need_program("gcc")
    command = ["gcc", "-g", "-O0", "-x", "c", "-o", str(program), "-", "-pthread"]
    subprocess.run(command, input=source.encode(), check=True)
    return program


def gdb(program: Path | str, core: Path, *commands: str) -> str:
    need_program("gdb")
    arguments = [part for command in commands for part in ("-ex", command)]
    found = subprocess.run(
        ["gdb", "-nx", "-batch", *arguments, str(program), str(core)],
        capture_output=True,
        text=True,
        env=os.environ | {"DEBUGINFOD_URLS": ""},
        timeout=60,
    )
    return found.stdout


def frames(backtrace: str) -> list[tuple[int, int, str | None]]:
    """Return number, address and symbol of the crashing thread's frames."""
    stack = backtrace.split("--- backtrace\n")[1].split("--- ")[0]
    found = []
    for line in stack.splitlines():
        match = _APPSCOPE_FRAME.fullmatch(line)
        assert match, f"not a frame as AppScope writes it: {line!r}"
        found.append((int(match[1]), int(match[2], 16), match[3]))
    return found


@pytest.mark.parametrize("name", FATAL)
async def test_a_crash_leaves_files_that_say_what_happened(
    recorder: RecorderService, name: str, tmp_path: Path
) -> None:
    program = crasher(name)

    pid, number = crash(program, cwd=tmp_path)
    record = await recorder.captured(pid)

    assert signals.name(number) == FATAL[name] == record.signal_name
    epoch = int(record.crashed_at)
    assert sorted(record.files) == sorted(crash_file_name(Kind(kind), epoch) for kind in FILES)
    for file, described in record.files.items():
        path = recorder.spool / str(pid) / file
        assert path.stat().st_size == described.size > 0
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o600)
        assert not described.truncated, described.note
    assert record.process.executable == str(program)
    assert record.host == "test-host"
    text = recorder.file(pid, "backtrace").read_text()
    assert text.startswith(f"backtrace info: signal {number} errno 0 fault address 0x")
    symbols = [symbol for _, _, symbol in frames(text)]
    assert "crash_here" in symbols[:8]
    if name != "abort":
        assert symbols[0] == "crash_here"
    assert f"{name}.c:" in text, "no line numbers though there is debug information"
    core = recorder.file(pid, "core")
    stack = gdb(program, core, "p/x $pc", "bt -8" if name == "threads" else "bt 8")
    assert f"= {frames(text)[0][1]:#x}" in stack
    assert "crash_here" in stack


@by_one_mechanism
async def test_snapshot_has_the_keys_of_appscope_and_the_cause(
    recorder: RecorderService, tmp_path: Path
) -> None:
    before = identity.boot_id()

    pid, record = await capture(recorder, crasher("null_pointer"), "an argument", cwd=tmp_path)

    snapshot = json.loads(recorder.file(pid, "snapshot").read_bytes())
    assert list(snapshot)[: len(_APPSCOPE_KEYS)] == _APPSCOPE_KEYS
    assert snapshot["Pid"] == pid
    assert snapshot["Cwd"] == str(tmp_path)
    assert snapshot["FaultAddress"] == "0x0"
    assert (record.fault_address, record.code_meaning) == (0, "address not mapped to object")
    assert snapshot["ProcessArgs"].endswith("null_pointer an argument")
    assert snapshot["HoldMilliseconds"] > 0
    assert snapshot["Limits"]["Max open files"]
    assert snapshot["Threads"] == [{"Tid": pid, "NsTid": pid, "Name": "null_pointer"}]
    assert any(module["BuildId"] for module in snapshot["Modules"])
    assert snapshot["CrashId"] == record.crash_id
    assert record.crash_id == identity.crash_id(before, pid, record.process.start_ticks)


@by_one_mechanism
async def test_info_and_cfg_have_the_form_of_appscope(recorder: RecorderService) -> None:
    pid, record = await capture(recorder, crasher("abort"))

    epoch = int(record.crashed_at)
    info = recorder.file(pid, "info").read_text()
    assert re.fullmatch(
        rf"Scope Version: crashbus \S+\nUnix Time: {epoch} sec\nPID: {pid}\nProcess name: abort",
        info,
    )
    cfg = recorder.file(pid, "cfg").read_text()
    assert "\n" not in cfg
    assert json.loads(cfg)["spool"] == str(recorder.spool)


@by_one_mechanism
async def test_secrets_are_in_no_text(recorder: RecorderService) -> None:
    environment = {"DB_PASSWORD": "hunter2", "LANG": "C", "PROXY": "http://bob:hunter2@proxy:1"}

    pid, _ = await capture(
        recorder, crasher("null_pointer"), "--api-key=hunter2", "--token", "hunter2",
        env=environment,
    )  # fmt: skip

    for path in (recorder.spool / str(pid)).iterdir():
        if not path.name.startswith("core_"):
            assert b"hunter2" not in path.read_bytes(), path.name
    shown = json.loads(recorder.file(pid, "snapshot").read_bytes())["Environment"]
    assert "LANG=C" in shown
    assert "DB_PASSWORD=<redacted>" in shown


@by_one_mechanism
async def test_secrets_of_this_host_s_own_kind_are_in_no_text(recorder: RecorderService) -> None:
    environment = {"SSN": "hunter2", "NOTE": "EMP-123456"}

    pid, _ = await capture(recorder, crasher("null_pointer"), "--ssn=hunter2", env=environment)

    for path in (recorder.spool / str(pid)).iterdir():
        if not path.name.startswith("core_"):
            content = path.read_bytes()
            assert b"hunter2" not in content and b"EMP-123456" not in content, path.name


@by_one_mechanism
async def test_python_that_reads_address_zero(recorder: RecorderService) -> None:
    python = "/usr/bin/python3"

    pid, record = await capture(recorder, python, "-c", "import ctypes; ctypes.string_at(0)")

    assert record.signal_name == "SIGSEGV"
    text = recorder.file(pid, "backtrace").read_text()
    top = frames(text)[0]
    assert f"= {top[1]:#x}" in gdb(python, recorder.file(pid, "core"), "p/x $pc")
    assert "libc.so" in text.splitlines()[3]
    assert any("_ctypes" in line for line in text.splitlines())


async def test_fault_shows_instruction_and_registers(recorder: RecorderService) -> None:
    program = crasher("null_pointer")

    pid, _ = await capture(recorder, program)

    core = recorder.file(pid, "core")
    shown = gdb(program, core, "x/i $pc", "p/x $pc", "p/x $sp", "p/x $rax")
    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    pc, stack, accumulator = re.findall(r"= (0x[0-9a-f]+)", shown)[-3:]
    registers, instruction = found["registers"], found["instruction"]
    assert (registers["rip"], registers["rsp"], registers["rax"]) == (pc, stack, accumulator)
    assert instruction["address"] == pc
    assert instruction["text"].split()[0][:3] == "mov"
    assert "mov" in shown
    assert instruction["touched"] == [{"access": "write", "address": "0x0", "size": 4}]
    text = recorder.file(pid, "backtrace").read_text()
    assert f"--- instruction\n{pc}: {instruction['text']}  (" in text
    assert "\nwrite 4 bytes at 0x0\n--- registers\n" in text
    assert f"rip {pc}" in text


@by_one_mechanism
async def test_backtrace_for_programs_says_the_same(recorder: RecorderService) -> None:
    pid, record = await capture(recorder, crasher("threads"))

    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    text = recorder.file(pid, "backtrace").read_text()
    first = found["threads"][0]
    assert [(n, int(f["pc"], 16), f["symbol"]) for n, f in enumerate(first["frames"])] == frames(
        text
    )
    assert [thread["crashed"] for thread in found["threads"]] == [True] + [False] * (
        len(found["threads"]) - 1
    )
    assert {f"{t['tid']} {t['name']}" for t in found["threads"][1:]} == set(
        re.findall(r"(?m)^--- thread (.*)$", text)
    )
    assert (found["crash_id"], found["fingerprint"]) == (record.crash_id, record.fingerprint)
    assert found["signal"]["name"] == "SIGSEGV"
    module = found["modules"][first["frames"][0]["module"]]
    assert module["path"] == str(crasher("threads"))
    assert (first["frames"][0]["file"] or "").endswith("threads.c")


@by_one_mechanism
async def test_jump_to_nowhere_is_told(recorder: RecorderService, tmp_path: Path) -> None:
    program = _compile(tmp_path / "jump", "int main(void) { ((void (*)(void))0x1230)(); }")

    pid, _ = await capture(recorder, program)

    text = recorder.file(pid, "backtrace").read_text()
    assert "--- instruction\n0x1230: there is no code: a jump or return to a wrong" in text


@by_one_mechanism
async def test_abort_has_no_faulting_instruction(recorder: RecorderService) -> None:
    pid, _ = await capture(recorder, crasher("abort"))

    text = recorder.file(pid, "backtrace").read_text()
    assert "--- instruction" not in text
    assert "--- registers" in text


@by_one_mechanism
async def test_snapshot_shows_what_was_in_use(recorder: RecorderService, tmp_path: Path) -> None:
    opened = tmp_path / "open \n file"
    script = """
import ctypes, socket, sys
kept = open(sys.argv[1], "w"), socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
kept[2].bind(sys.argv[2].encode() + b"/\\xff")
ctypes.string_at(0)
"""
    pid, _ = await capture(recorder, "/usr/bin/python3", "-c", script, opened, tmp_path)

    snapshot = json.loads(recorder.file(pid, "snapshot").read_bytes())
    assert str(opened) in [file["Target"] for file in snapshot["OpenFiles"]]
    (listening,) = [one for one in snapshot["Sockets"] if one["Family"] == "AF_INET"]
    assert listening["State"] == "LISTEN"
    assert listening["Local"].startswith("127.0.0.1:")
    assert f"{tmp_path}/\\xff" in [one.get("Path") for one in snapshot["Sockets"]]
    assert int(snapshot["Status"]["VmRSS"].split()[0]) > 1000
    assert snapshot["Status"]["PPid"] == str(os.getpid())
    assert int(snapshot["Memory"]["Rss"].split()[0]) > 1000
    assert any(" / " in mount for mount in snapshot["Mounts"])


async def test_every_thread_is_there(recorder: RecorderService) -> None:
    program = crasher("threads")

    pid, _ = await capture(recorder, program)

    text = recorder.file(pid, "backtrace").read_text()
    listed = json.loads(recorder.file(pid, "snapshot").read_bytes())["Threads"]
    others = {int(line.split()[2]) for line in text.splitlines() if line.startswith("--- thread")}
    assert len(listed) > 2
    assert len(others) == len(listed) - 1
    assert others < {thread["Tid"] for thread in listed}
    in_gdb = gdb(program, recorder.file(pid, "core"), "info threads")
    assert len(re.findall(r"(?m)^[* ] +\d+ .*LWP \d+", in_gdb)) == len(listed)


@by_one_mechanism
async def test_program_that_only_root_can_reach_has_symbols(
    recorder: RecorderService, tmp_path: Path
) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    program = Path(shutil.copy(crasher("null_pointer"), private))

    pid, _ = await capture(recorder, program)

    assert frames(recorder.file(pid, "backtrace").read_text())[0][2] == "crash_here"


@by_one_mechanism
async def test_program_that_was_deleted_has_symbols(
    recorder: RecorderService, tmp_path: Path
) -> None:
    program = Path(shutil.copy(crasher("waiting"), tmp_path / "deleted"))
    process = subprocess.Popen([program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline().startswith(b"ready")
        program.unlink()
        process.send_signal(11)
        process.wait(60)

    await recorder.captured(process.pid)

    text = recorder.file(process.pid, "backtrace").read_text()
    assert "main" in [symbol for _, _, symbol in frames(text)]


async def test_process_whose_first_thread_has_ended_is_known(
    recorder: RecorderService, tmp_path: Path
) -> None:
    program = _compile(
        tmp_path / "headless",
        """
        #include <pthread.h>
        #include <sys/socket.h>
        static pthread_t first;
        static void *crash_here(void *unused) {
            pthread_join(first, 0);
            *(volatile int *)0 = 1;
            return unused;
        }
        int main(void) {
            pthread_t other;
            socket(AF_INET, SOCK_DGRAM, 0);
            first = pthread_self();
            pthread_create(&other, 0, crash_here, 0);
            pthread_exit(0);
        }
        """,
    )

    pid, record = await capture(recorder, program, "argument", cwd=tmp_path)

    assert record.process.executable == str(program)
    assert record.process.command_line[1:] == ("argument",)
    snapshot = json.loads(recorder.file(pid, "snapshot").read_bytes())
    assert snapshot["Cwd"] == str(tmp_path)
    if kernel_version(os.uname().release) >= (6, 9):  # pidfd_open(2), PIDFD_THREAD
        assert [one["Type"] for one in snapshot["Sockets"]] == ["SOCK_DGRAM"]
    assert frames(recorder.file(pid, "backtrace").read_text())[0][2] == "crash_here"


async def test_process_of_a_user_is_captured_for_root_alone(recorder: RecorderService) -> None:
    pid, record = await capture(recorder, crasher("null_pointer"), user=65534, group=65534)

    assert (record.process.uid, record.process.gid) == (65534, 65534)
    assert recorder.file(pid, "core").stat().st_uid == 0
    assert (recorder.spool / str(pid)).stat().st_mode & 0o7777 == 0o1777


async def test_core_limit_of_zero_does_not_suppress_it(recorder: RecorderService) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    pid, record = await capture(recorder, crasher("null_pointer"), preexec_fn=limit)

    assert not record.files[f"core_{int(record.crashed_at)}"].truncated
    assert recorder.file(pid, "core").stat().st_size > 0


async def test_signal_that_was_sent_tells_its_sender(recorder: RecorderService) -> None:
    process = subprocess.Popen(["/bin/sleep", "60"])
    await until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
    process.send_signal(7)
    process.wait(60)

    record = await recorder.captured(process.pid)

    assert (record.signal_name, record.code, record.fault_address) == ("SIGBUS", 0, None)
    snapshot = json.loads(recorder.file(process.pid, "snapshot").read_bytes())
    assert snapshot["SenderPid"] == os.getpid()


@by_one_mechanism
async def test_name_with_a_line_break_stays_on_its_line(
    recorder: RecorderService, tmp_path: Path
) -> None:
    program = shutil.copy(crasher("null_pointer"), tmp_path / "evil\nPID: 1")

    pid, record = await capture(recorder, program)

    assert record.process.comm == "evil\nPID: 1"
    lines = recorder.file(pid, "info").read_text().splitlines()
    assert lines[2:] == [f"PID: {pid}", "Process name: evil\\x0aPID: 1"]


@by_one_mechanism
async def test_environment_and_arguments_of_two_mebibytes_each_do_not_hurt(
    recorder: RecorderService,
) -> None:
    environment = {f"V{number}": "x" * 100_000 for number in range(21)}

    pid, record = await capture(
        recorder,
        crasher("null_pointer"),
        *["y" * 100_000] * 21,
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, -1)),  # execve(2)
    )

    assert recorder.file(pid, "snapshot").stat().st_size < 1024 * 1024
    assert any("environment cut" in note for note in record.notes)


async def test_untouched_memory_takes_no_room(recorder: RecorderService) -> None:
    script = "import ctypes, mmap; m = mmap.mmap(-1, 128 << 20); ctypes.string_at(0)"

    pid, record = await capture(recorder, "/usr/bin/python3", "-c", script)

    status = recorder.file(pid, "core").stat()
    assert status.st_size > 128 << 20
    assert status.st_blocks * 512 < 64 << 20
    assert not record.files[f"core_{int(record.crashed_at)}"].truncated
