"""Real crashes on the real kernel, each event checked in its fields.

They hold whoever owns core_pattern: the kernel takes all it needs in the moment of the signal.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from crashbus import SignalCount, SignalEvent, crash_id, identity
from crashbus.parts import Oom
from services.common.process import read_process
from services.detector import offsets
from services.detector.btf import Btf
from services.detector.program import BTF_FILE
from tests.detector.watching import HOST, Watch
from tests.support.cgroup import limit, memory_cgroup
from tests.support.crashers import FATAL, crasher
from tests.support.disk import tmpfs
from tests.support.requirements import need_btf, need_root
from tests.support.victim import Victim
from tests.support.wait import until

THREADS = """
import signal, threading
for _ in range(8):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
signal.pause()
"""
MAPPED = "address not mapped to object"
CODES = {
    "null_pointer": (1, MAPPED),
    "bus_error": (2, "nonexistent physical address"),
    "division_by_zero": (1, "integer division by zero"),
    "illegal_instruction": (2, "illegal operand"),
    "abort": (-6, "sent by a process to one thread"),
    "stack_overflow": (1, MAPPED),
    "threads": (1, MAPPED),
}


@pytest.mark.parametrize("name", FATAL)
async def test_death_is_told_in_full(watch: Watch, tmp_path: Path, name: str) -> None:
    victim = Victim(crasher(name), "7", cwd=tmp_path)
    before = time.time()
    victim.go().process.wait()
    after = time.time()

    event = await watch.event(victim.pid)

    process = event.process
    boot_id = identity.boot_id()
    assert event.crash_id == crash_id(boot_id, victim.pid, victim.start_ticks)
    assert event.host == HOST
    assert (process.boot_id, process.pid, process.ns_pid) == (boot_id, victim.pid, victim.pid)
    assert process.start_ticks == victim.start_ticks
    assert (process.uid, process.gid) == (os.getuid(), os.getgid())
    assert process.comm == name[:15]
    assert process.executable == str(crasher(name))
    assert process.command_line == (str(crasher(name)), "7")
    assert process.cgroup is not None
    assert f":{process.cgroup}\n" in Path("/proc/self/cgroup").read_text()
    assert event.signal_name == FATAL[name]
    assert event.signal == signal.Signals[FATAL[name]] == -victim.process.returncode
    assert (event.code, event.code_meaning) == CODES[name]
    assert (event.disposition, event.fatal, event.handler) == ("default", True, None)
    assert (event.tid == victim.pid) == (name != "threads")
    assert before - 0.02 <= event.time <= after + 0.02
    assert 0 <= time.monotonic_ns() - event.monotonic_ns < 60e9


@pytest.mark.parametrize(
    ("name", "is_right"),
    [
        ("null_pointer", lambda address: address == 0),
        ("bus_error", lambda address: address % 4096 == 0 and address > 0),
        ("stack_overflow", lambda address: address > 1 << 32),
        ("division_by_zero", lambda address: address > 4096),  # the instruction's own
        ("abort", lambda address: address is None),
    ],
)
async def test_fault_address(watch: Watch, tmp_path: Path, name: str, is_right) -> None:  # type: ignore[no-untyped-def]
    victim = Victim(crasher(name), cwd=tmp_path).go()
    victim.process.wait()
    event = await watch.event(victim.pid)
    assert is_right(event.fault_address)


async def test_abort_names_the_process_itself_as_sender(watch: Watch, tmp_path: Path) -> None:
    victim = Victim(crasher("abort"), cwd=tmp_path).go()
    event = await watch.event(victim.pid)
    assert event.sender is not None
    assert (event.sender.pid, event.sender.uid) == (victim.pid, os.getuid())


async def test_sender_of_kill(watch: Watch, tmp_path: Path) -> None:
    victim = Victim(crasher("waiting"), cwd=tmp_path)
    victim.go().kill(signal.SIGBUS)
    event = await watch.event(victim.pid)
    assert (event.signal_name, event.code) == ("SIGBUS", 0)
    assert event.code_meaning == "sent by a process with kill"
    assert event.fault_address is None
    assert event.sender is not None
    assert (event.sender.pid, event.sender.uid) == (os.getpid(), os.getuid())


async def test_handled_fault_is_told_with_its_handler(watch: Watch, tmp_path: Path) -> None:
    victim = Victim(crasher("handled"), "1", "stay", cwd=tmp_path).go()
    try:
        assert victim.process.stdout is not None
        handler = int(victim.process.stdout.readline(), 16)
        event = await watch.event(victim.pid)
    finally:
        victim.end()
    assert (event.disposition, event.fatal, event.fault_address) == ("handled", False, 0)
    assert event.handler is not None
    assert event.handler.address == handler
    assert event.handler.flags & 0x40000000  # SA_NODEFER
    assert not event.handler.appscope


async def test_handler_in_appscopes_library_is_recognised(watch: Watch, tmp_path: Path) -> None:
    victim = Victim(crasher("handled_by_libscope"), cwd=tmp_path).go()
    try:
        event = await watch.event(victim.pid)
    finally:
        victim.end()
    assert event.handler is not None
    assert event.handler.appscope


async def test_flood_is_counted_and_the_death_is_told(watch: Watch, tmp_path: Path) -> None:
    victim = Victim(crasher("handled"), "5000", "die", cwd=tmp_path).go()
    victim.process.wait()
    await watch.event(victim.pid, lambda event: event.disposition == "default")

    def counts() -> list[SignalCount]:
        watch.detector.tick()
        return watch.all(SignalCount, victim.pid)

    first, *further = await until(counts)
    watch.detector.tick()
    counted = [first, *further, *watch.all(SignalCount, victim.pid)[1 + len(further) :]]
    assert sum(one.count for one in counted) == 4999
    assert first.signal_name == "SIGSEGV"
    assert first.crash_id == crash_id(identity.boot_id(), victim.pid, victim.start_ticks)
    assert first.process.comm == "handled"
    dispositions = [one.disposition for one in watch.all(SignalEvent, victim.pid)]
    assert sorted(dispositions) == ["default", "handled"]


async def test_handled_signal_after_quiet_is_told_again(quick_watch: Watch, tmp_path: Path) -> None:
    victim = Victim("/usr/bin/env", "sh", "-c", "trap : INT; echo ready; while :; do sleep 1; done")
    victim.go()
    try:
        victim.kill(signal.SIGINT)
        await until(lambda: len(quick_watch.all(SignalEvent, victim.pid)) == 1)
        quiet_from = time.monotonic()
        await until(lambda: time.monotonic() - quiet_from > 0.3)
        os.kill(victim.pid, signal.SIGINT)
        await until(lambda: len(quick_watch.all(SignalEvent, victim.pid)) == 2)
    finally:
        victim.end()


async def test_sigint_is_watched_only_when_asked_for(
    watch: Watch, quick_watch: Watch, tmp_path: Path
) -> None:
    victim = Victim(crasher("waiting"), cwd=tmp_path)
    victim.go().kill(signal.SIGINT)
    event = await quick_watch.event(victim.pid)
    assert (event.signal_name, event.disposition) == ("SIGINT", "default")
    assert event.sender is not None
    assert event.sender.pid == os.getpid()

    later = Victim(crasher("null_pointer"), cwd=tmp_path).go()
    await watch.event(later.pid)
    assert watch.all(SignalEvent, victim.pid) == []


async def test_sigterm_of_many_threads_is_one_death(watch: Watch, tmp_path: Path) -> None:
    watching = Watch(tmp_path / "term", signals="SIGTERM")
    try:
        victim = Victim(sys.executable, "-c", THREADS, cwd=tmp_path).go()
        victim.kill(signal.SIGTERM)
        victim.process.wait()
        later = Victim(crasher("waiting"), cwd=tmp_path).go()
        later.kill(signal.SIGTERM)
        await watching.event(later.pid)
        (event,) = watching.all(SignalEvent, victim.pid)
    finally:
        watching.close()
    assert (event.signal_name, event.disposition) == ("SIGTERM", "default")
    assert event.sender is not None
    assert event.sender.pid == os.getpid()
    assert watch.all(SignalEvent, victim.pid) == []


@pytest.mark.parametrize(
    "hidden", [[], ["MARK_VICTIM_GIVES_TASK"], ["AT_MM", "AT_TASK_CG", "AT_CSS"]]
)
async def test_program_fits_kernels_that_show_less(
    hidden: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel hides is asked of /proc: the process is still there here."""
    found = offsets.definitions(Btf(BTF_FILE.read_bytes()))
    shown = {
        name: value for name, value in found.items() if not name.startswith(tuple(hidden) or "-")
    }
    monkeypatch.setattr(offsets, "definitions", lambda btf: shown)
    watching = Watch(tmp_path)
    victim = Victim(crasher("handled"), "1", "stay", cwd=tmp_path).go()
    try:
        event = await watching.event(victim.pid)
        assert event.process == read_process(victim.pid, identity.boot_id())
    finally:
        victim.end()
        watching.close()


async def test_thread_that_dies_is_a_failure_of_the_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(milliseconds: int) -> None:
        raise OSError("the ring buffer is gone")

    watching = Watch(tmp_path)
    monkeypatch.setattr(watching.detector._program, "poll", broken)
    failure = await until(lambda: watching.detector.failure)
    watching.close()
    assert "the ring buffer is gone" in str(failure)


async def test_pid_in_its_own_namespace(watch: Watch, tmp_path: Path) -> None:
    inner = 'sh -c "$0" & echo $!; wait'
    outer = subprocess.Popen(
        ["unshare", "--pid", "--fork", "sh", "-c", inner, f"exec {crasher('null_pointer')} inside"],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    )
    output, _ = outer.communicate(timeout=60)

    def found() -> SignalEvent | None:
        return next(
            (one for one in watch.seen(SignalEvent) if "inside" in one.process.command_line), None
        )

    event = await until(found)
    assert event is not None
    assert event.process.ns_pid == int(output)
    assert event.process.pid != event.process.ns_pid


async def test_sender_outside_of_the_pid_namespace_is_0(watch: Watch, tmp_path: Path) -> None:
    outer = subprocess.Popen(
        ["unshare", "--pid", "--fork", "sh", "-c", f"{crasher('waiting')} & wait"],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert outer.stdout is not None
    outer.stdout.readline()
    pid = int(subprocess.check_output(["pgrep", "-nx", "waiting"]))
    os.kill(pid, signal.SIGSEGV)
    event = await watch.event(pid)
    outer.communicate(timeout=60)
    assert event.sender is not None
    assert event.sender.pid == 0


async def test_death_of_a_namespaces_first_process(watch: Watch, tmp_path: Path) -> None:
    marker = f"first-{os.getpid()}"
    subprocess.run(["unshare", "--pid", "--fork", crasher("null_pointer"), marker], cwd=tmp_path)

    def found() -> SignalEvent | None:
        return next(
            (one for one in watch.seen(SignalEvent) if marker in one.process.command_line), None
        )

    event = await until(found)
    assert event is not None
    assert (event.process.ns_pid, event.disposition) == (1, "default")


async def test_other_user(watch: Watch, tmp_path: Path) -> None:
    victim = Victim(crasher("null_pointer"), cwd="/", user=65534, group=65533, extra_groups=[])
    event = await watch.event(victim.go().pid)
    assert (event.process.uid, event.process.gid) == (65534, 65533)


async def test_names_that_are_not_utf8(watch: Watch, tmp_path: Path) -> None:
    program = bytes(tmp_path) + b"/b\xffd"
    shutil.copy(bytes(crasher("null_pointer")), program)
    victim = Victim(program, b"\xfe\n", cwd=tmp_path)
    event = await watch.event(victim.go().pid)
    assert event.process.comm == "b\\xffd"
    assert event.process.executable == f"{tmp_path}/b\\xffd"
    assert event.process.command_line == (f"{tmp_path}/b\\xffd", "\\xfe\n")


async def test_executable_below_a_mount(watch: Watch, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=8m") as deep:
        program = deep / "a" / "b" / "crash"
        program.parent.mkdir(parents=True)
        shutil.copy(crasher("null_pointer"), program)
        victim = Victim(program, cwd="/")
        event = await watch.event(victim.go().pid)
        victim.process.wait()
    assert event.process.executable == str(program)


async def test_long_command_line_is_read_from_proc(watch: Watch, tmp_path: Path) -> None:
    long = ["x" * 700, "y" * 700, "z" * 700]
    victim = Victim(crasher("handled"), "1", "stay", *long, cwd=tmp_path).go()
    try:
        event = await watch.event(victim.pid)
    finally:
        victim.end()
    assert event.process.command_line[3:] == tuple(long)


async def test_container_is_known_when_the_process_is_gone(watch: Watch, tmp_path: Path) -> None:
    identifier = "0123456789abcdef" * 4
    with memory_cgroup(f"docker/{identifier}") as group:
        victim = Victim(crasher("null_pointer"), cwd=tmp_path)
        (group / "cgroup.procs").write_text(str(victim.pid))
        victim.go().process.wait()
        event = await watch.event(victim.pid)
    assert event.process.cgroup is not None
    assert event.process.cgroup.endswith(f"/docker/{identifier}")
    assert event.process.container is not None
    assert event.process.container.id == identifier
    assert event.process.container.runtime == "docker"


async def test_oom_kill(watch: Watch, tmp_path: Path) -> None:
    with memory_cgroup("hog") as group:
        limit(group, 32 * 1024**2)
        victim = Victim(crasher("memory_hog"), cwd=tmp_path)
        (group / "cgroup.procs").write_text(str(victim.pid))
        victim.go().process.wait()
        event = await watch.event(victim.pid)
    assert victim.process.returncode == -signal.SIGKILL
    assert (event.disposition, event.fatal) == ("oom_kill", True)
    assert (event.signal_name, event.code_meaning) == ("SIGKILL", "sent by the kernel")
    assert event.crash_id == crash_id(identity.boot_id(), victim.pid, victim.start_ticks)
    assert event.process.executable == str(crasher("memory_hog"))
    assert event.sender is None
    assert event.oom is not None
    if "MARK_VICTIM_GIVES_TASK" not in offsets.definitions(Btf(BTF_FILE.read_bytes())):
        assert event.oom == Oom()  # the collector has it from the kernel's log
        return
    assert event.oom.oom_score_adj == int(Path("/proc/self/oom_score_adj").read_text())
    rss, total = event.oom.anon_rss_kib, event.oom.total_vm_kib
    assert rss is not None
    assert total is not None
    assert 24 * 1024 < rss <= 32 * 1024 < total


NOT_DUMPABLE = "import ctypes; ctypes.CDLL(None).prctl(4, 0); "
ANOTHER_USER = "import os; os.setresuid(65534, 65534, 65534); "
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


@pytest.mark.parametrize(
    ("before", "limit", "dumpable"),
    [
        ("", "unlimited", 1),
        (NOT_DUMPABLE, "0", 0),
        (ANOTHER_USER, "1", int(Path("/proc/sys/fs/suid_dumpable").read_text())),
        ("", "4096", 1),
    ],
)
async def test_what_decides_on_a_core_is_told(
    watch: Watch, tmp_path: Path, before: str, limit: str, dumpable: int
) -> None:
    process = subprocess.Popen(
        ["prlimit", f"--core={limit}", sys.executable, "-c", before + DIES], cwd=tmp_path
    )
    process.wait()

    event = await watch.event(process.pid)

    assert event.dumpable == dumpable
    assert event.core_limit == (2**64 - 1 if limit == "unlimited" else int(limit))


async def test_memory_that_cannot_be_read_forbids_no_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_root()
    need_btf()
    definitions = offsets.definitions

    def of_no_memory(btf: Btf) -> dict[str, int]:  # this member is NULL but in reclaim
        return definitions(btf) | {"AT_TASK_MM": btf.offset("task_struct", "reclaim_state")}

    monkeypatch.setattr(offsets, "definitions", of_no_memory)
    with closing(Watch(tmp_path / "watch")) as watch:
        process = subprocess.Popen([sys.executable, "-c", DIES], cwd=tmp_path)
        process.wait()

        event = await watch.event(process.pid)

    assert (event.dumpable, event.core_limit) == (None, None)
