"""Whatever kind of process crashes is captured; a row of docs/capture.md for each test."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.recorder.test_capture import by_one_mechanism, capture, frames, gdb, recorder
from tests.support import core_pattern, go
from tests.support.crashers import SOURCES, crasher
from tests.support.recorder import RecorderService, crash
from tests.support.requirements import lacking, need_program
from tests.support.wait import until

__all__ = ["recorder"]  # the module's fixture

NOBODY = 65534
MIB = 1024 * 1024

# No library at all, so that no 32-bit one is needed: two threads, of which one waits.
_THIRTY_TWO_BITS = """
static volatile int is_waiting;
static char stack[65536] __attribute__((aligned(16)));
static int call(int number, int first, void *second) {
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "0"(number), "b"(first), "c"(second) : "memory");
    return result;
}
static void wait_here(void) { is_waiting = 1; for (;;) call(29, 0, 0); }  /* pause */
static void waiter(void) { wait_here(); }
static void start(void) {
    int result;
    __asm__ volatile(
        "int $0x80\\n test %%eax, %%eax\\n jnz 1f\\n xor %%ebp, %%ebp\\n call *%%esi\\n 1:"
        : "=a"(result)
        : "0"(120), "b"(0x10f00 /* VM, FS, FILES, SIGHAND, THREAD */), "c"(stack + sizeof stack),
          "S"(waiter), "d"(0), "D"(0)
        : "memory");
}
static void crash_here(void) { *(volatile int *)0 = 1; }
static void caller(void) { while (!is_waiting) call(158, 0, 0); crash_here(); }  /* sched_yield */
void _start(void) { start(); caller(); }
"""

_TRACER = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
child = os.fork()
if not child:
    libc.ptrace(0, 0, 0, 0)
    os.execv(sys.argv[1], sys.argv[1:2])
print(child, flush=True)
while True:
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        break
    stopped = os.WSTOPSIG(status)
    libc.ptrace(7, child, 0, 0 if stopped == signal.SIGTRAP else stopped)
sys.exit(os.WTERMSIG(status))
"""


def build(program: Path, *options: str, source: str = "null_pointer") -> Path:
    need_program("gcc")
    subprocess.run(
        ["gcc", "-g", "-O0", "-pthread", *options, "-o", program, SOURCES / f"{source}.c"],
        check=True,
    )
    return program


def top(recorder: RecorderService, pid: int) -> str | None:
    """Return the function that the backtrace says it crashed in."""
    return frames(recorder.file(pid, "backtrace").read_text())[0][2]


@contextmanager
def written(path: str, value: str) -> Iterator[None]:
    """Set a file of /proc for a while."""
    place = Path(path)
    before = place.read_text()
    place.write_text(value)
    try:
        yield
    finally:
        place.write_text(before)


@by_one_mechanism
@pytest.mark.parametrize(
    "options", [("-static",), ("-no-pie",), ("-pie", "-fPIE"), ("-static-pie", "-fPIE")]
)
async def test_however_it_is_linked(
    recorder: RecorderService, tmp_path: Path, options: tuple[str, ...]
) -> None:
    program = build(tmp_path / "program", *options)

    pid, record = await capture(recorder, program)

    assert not any(file.truncated for file in record.files.values())
    assert top(recorder, pid) == "crash_here"
    assert "crash_here" in gdb(program, recorder.file(pid, "core"), "bt")


@by_one_mechanism
async def test_stripped_program(recorder: RecorderService, tmp_path: Path) -> None:
    program = build(tmp_path / "program", "-s", "-Wl,--build-id")

    pid, record = await capture(recorder, program)

    text = recorder.file(pid, "backtrace").read_text()
    first = next(line for line in text.splitlines() if line.startswith("#0"))
    assert record.state == "complete"
    assert re.search(rf"in {re.escape(str(program))} \([0-9a-f]{{40}}\)", first)


async def test_thirty_two_bits(recorder: RecorderService, tmp_path: Path) -> None:
    source, program = tmp_path / "small.c", tmp_path / "small"
    source.write_text(_THIRTY_TWO_BITS)
    need_program("gcc")
    options = ["-m32", "-nostdlib", "-static", "-ffreestanding", "-fno-pie", "-no-pie", "-g"]
    subprocess.run(["gcc", *options, "-o", program, source], check=True)

    pid, record = await capture(recorder, program)

    core = recorder.file(pid, "core")
    assert (record.signal_name, record.fault_address) == ("SIGSEGV", 0)
    assert not record.files[core.name].truncated
    assert core.read_bytes()[4] == 1  # ELFCLASS32
    # drgn has no unwinder for i386.
    text = recorder.file(pid, "backtrace").read_text()
    crashed, _, other = text.partition("--- thread ")
    stack = frames(crashed.split("incomplete:")[0])
    assert [symbol for _, _, symbol in stack] == ["crash_here", "caller", "_start"]
    assert re.search(r"crash_here \+ \d+  at \S+small.c:\d+  in", crashed)
    assert re.findall(r"(?m)^#\d+ 0x[0-9a-f]+ (\w+)", other)[-3:] == [
        "wait_here",
        "waiter",
        "start",
    ]
    assert "incomplete: by frame pointers" in text
    assert "crash_here" in gdb(program, core, "bt")


@by_one_mechanism
@pytest.mark.parametrize("compiler", go.COMPILERS)
@pytest.mark.parametrize(
    "options", [(), ("-ldflags=-s -w",), ("-ldflags=-s -w", "-buildmode=pie")], ids=str
)
async def test_go_program(
    recorder: RecorderService, tmp_path: Path, compiler: str, options: tuple[str, ...]
) -> None:
    """With symbols and, as usual in containers, without any."""
    source = SOURCES / "crash.go"
    program = go.build(compiler, tmp_path / "program", source, *options)

    # Without this a Go program that panics exits instead, and nothing has crashed.
    pid, record = await capture(recorder, program, env=os.environ | {"GOTRACEBACK": "crash"})

    assert record.signal_name == "SIGABRT"
    assert not record.files[recorder.file(pid, "core").name].truncated
    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    crashed = found["threads"][0]
    functions = [frame["symbol"] for frame in crashed["frames"]]
    first = functions.index("main.(*holder).crashHere")
    assert functions[first:] == [
        "main.(*holder).crashHere",
        "main.main.func2",
        "main.call",
        "main.main",
        "runtime.main",
        "runtime.goexit",
    ]
    assert {name.partition(".")[0] for name in functions[:first]} == {"runtime"}
    at = crashed["frames"][first]
    assert (at["file"], at["line"]) == (str(source), 8)
    assert found["fingerprint_frames"][0] == "main.holder.crashHere"


# Its root, a pointer, becomes one that leads nowhere; Rust follows it.
_RUST = """
import ctypes, rpds
broken = rpds.HashTrieMap({"a": 1})
ctypes.memset(id(broken) + object.__basicsize__, 0x41, 32)
broken.get("a")
"""


@by_one_mechanism
async def test_library_with_gaps_between_its_parts(
    recorder: RecorderService, tmp_path: Path
) -> None:
    """As alignment leaves them, or tools that change libraries, in many Python packages."""
    (tmp_path / "part.c").write_text("int crash_here(int *at) { return *at + 1; }")
    (tmp_path / "main.c").write_text("int crash_here(int *); int main() { return crash_here(0); }")
    library, program = tmp_path / "libpart.so", tmp_path / "program"
    gaps = ["gcc", "-g", "-shared", "-fPIC", "-Wl,-z,max-page-size=0x200000"]
    subprocess.run([*gaps, "-o", library, tmp_path / "part.c"], check=True)
    subprocess.run(["gcc", "-g", "-o", program, tmp_path / "main.c", library], check=True)

    pid, _ = await capture(recorder, program)

    lines = recorder.file(pid, "backtrace").read_text()
    assert [name for _, _, name in frames(lines)][:2] == ["crash_here", "main"]
    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    first = found["threads"][0]["frames"][0]
    assert found["modules"][first["module"]]["path"] == str(library)


_MAPPED_TWICE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
int main(int count, char **arguments) {
    Dl_info found;
    dladdr((void *)puts, &found);
    const char *files[] = {arguments[1], found.dli_fname};
    void *places[] = {(void *)0x10000, (void *)0x100000000000};
    for (int one = 0; one < 2; one++) {
        int file = open(files[one], O_RDONLY);
        void *low = mmap(places[one], 4096, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 0);
        if (low == MAP_FAILED) return 1;
    }
    void *library = dlopen(arguments[1], RTLD_NOW);
    unlink(arguments[1]);  /* so that its names come from the very file or not at all */
    return ((int (*)(int *))dlsym(library, "crash_here"))(0);
}
"""


@by_one_mechanism
async def test_file_that_is_mapped_once_more_hides_none_of_those_between(
    recorder: RecorderService, tmp_path: Path
) -> None:
    """As a second namespace of dlmopen(3) has it, or who reads its symbols."""
    (tmp_path / "part.c").write_text("int crash_here(int *at) { return *at + 1; }")
    (tmp_path / "main.c").write_text(_MAPPED_TWICE)
    library, program = tmp_path / "libpart.so", tmp_path / "program"
    for options in (("-shared", "-fPIC", "-o", library, "part.c"), ("-o", program, "main.c")):
        subprocess.run(["gcc", "-g", *options], check=True, cwd=tmp_path)

    pid, _ = await capture(recorder, program, library)

    lines = recorder.file(pid, "backtrace").read_text()
    assert [name for _, _, name in frames(lines)][:2] == ["crash_here", "main"]
    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    first = found["threads"][0]["frames"][0]
    assert found["modules"][first["module"]]["path"] == f"{library} (deleted)"


@by_one_mechanism
async def test_rust(recorder: RecorderService) -> None:
    pid, _ = await capture(recorder, sys.executable, "-c", _RUST)

    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    first = found["threads"][0]["frames"][0]
    assert first["symbol"].startswith("_R")
    assert first["readable"].startswith("rpds::map::hash_trie_map::HashTrieMap<rpds::Key, pyo3::")
    assert first["readable"] in recorder.file(pid, "backtrace").read_text()
    assert found["fingerprint_frames"][0].startswith("rpds::map::hash_trie_map::HashTrieMap::get")
    assert "rpds::HashTrieMapPy::__pymethod_get__" in found["fingerprint_frames"]


@by_one_mechanism
async def test_java_virtual_machine(recorder: RecorderService, tmp_path: Path) -> None:
    """It reserves gigabytes, has threads of its own, and handles its own faults."""
    program = need_program("rmiregistry")  # the smallest that comes with it
    process = subprocess.Popen(
        [program, "0"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    await until(lambda: "Signal Dispatch" in thread_names(process.pid))  # it has started
    process.send_signal(signal.SIGSEGV)
    assert process.wait(60) == -signal.SIGABRT

    record = await recorder.captured(process.pid)

    core = recorder.file(process.pid, "core")
    assert not record.files[core.name].truncated
    found = json.loads(recorder.file(process.pid, "backtrace_json").read_bytes())
    crashed = found["threads"][0]
    modules = [Path(module["path"]).name for module in found["modules"]]
    there = {modules[frame["module"]] for frame in crashed["frames"] if frame["module"] is not None}
    assert "libjvm.so" in there
    assert "JVM_handle_linux_signal" in [frame["symbol"] for frame in crashed["frames"]]
    # What the machine says of it itself lies where it ran.
    assert list(tmp_path.glob(f"hs_err_pid{process.pid}.log"))


def thread_names(pid: int) -> set[str]:
    names = set()
    for comm in Path(f"/proc/{pid}/task").glob("*/comm"):
        with suppress(OSError):  # a thread ends
            names.add(comm.read_text().strip())
    return names


@by_one_mechanism
async def test_address_sanitizer(recorder: RecorderService, tmp_path: Path) -> None:
    """It reserves 20 TiB and sets RLIMIT_CORE to 0."""
    program = build(tmp_path / "program", "-fsanitize=address")
    environment = os.environ | {"ASAN_OPTIONS": "abort_on_error=1"}

    pid, record = await capture(recorder, program, env=environment)

    assert record.signal_name == "SIGABRT"
    assert not any(file.truncated for file in record.files.values())
    text = recorder.file(pid, "backtrace").read_text()
    assert "crash_here" in [symbol for _, _, symbol in frames(text)]
    assert recorder.file(pid, "core").stat().st_blocks * 512 < 512 * MIB


async def test_a_thousand_threads(recorder: RecorderService) -> None:
    pid, record = await capture(recorder, crasher("threads"), "1000", within=60)

    text = recorder.file(pid, "backtrace").read_text()
    assert not record.notes
    assert top(recorder, pid) == "crash_here"
    assert text.count("\n--- thread ") == 1001


async def nothing_comes_of(recorder: RecorderService, pid: int) -> None:
    """The next crash is the proof that nothing was on its way."""
    await capture(recorder, crasher("null_pointer"))
    assert not (recorder.spool / str(pid)).exists()


@pytest.mark.parametrize("limit", [2, 4096, 100_000])
async def test_small_core_limit_is_none(recorder: RecorderService, limit: int) -> None:
    """It is one for the files that the kernel writes itself."""
    need_program("prlimit")

    pid, record = await capture(recorder, "prlimit", f"--core={limit}", crasher("null_pointer"))

    core = recorder.file(pid, "core")
    assert not record.files[core.name].truncated
    assert core.stat().st_size > limit


async def test_core_limit_of_one_byte(recorder: RecorderService) -> None:
    need_program("prlimit")

    pid, _ = crash("prlimit", "--core=1", crasher("null_pointer"))

    if core_pattern.current().startswith("|"):  # the kernel starts no helper
        await nothing_comes_of(recorder, pid)
        return
    record = await recorder.captured(pid)
    assert not record.files[recorder.file(pid, "core").name].truncated


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A directory that every user can look into."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    return tmp_path


@pytest.mark.parametrize("dumpable", ["0", "2"])
@pytest.mark.parametrize(("mode", "why"), [(0o4755, "setuid"), (0o111, "unreadable")])
async def test_program_whose_user_may_not_look_into_it(
    recorder: RecorderService, public: Path, mode: int, why: str, dumpable: str
) -> None:
    program = Path(shutil.copy(crasher("null_pointer"), public / why))
    program.chmod(mode)

    with written("/proc/sys/fs/suid_dumpable", dumpable):
        process = subprocess.Popen([program], user=NOBODY, stderr=subprocess.DEVNULL)
        assert process.wait(60) == -signal.SIGSEGV

    await _as_suid_dumpable_says(recorder, process.pid, dumpable)


@by_one_mechanism
@pytest.mark.parametrize("dumpable", ["0", "2"])
async def test_service_that_became_another_user(recorder: RecorderService, dumpable: str) -> None:
    """As most do that root starts."""
    script = f"import ctypes, os; os.setuid({NOBODY}); ctypes.string_at(0)"

    with written("/proc/sys/fs/suid_dumpable", dumpable):
        pid, number = crash("/usr/bin/python3", "-c", script)

    assert number == signal.SIGSEGV
    await _as_suid_dumpable_says(recorder, pid, dumpable)


async def _as_suid_dumpable_says(recorder: RecorderService, pid: int, dumpable: str) -> None:
    if dumpable == "0":
        await nothing_comes_of(recorder, pid)
        return
    record = await recorder.captured(pid)
    core = recorder.file(pid, "core")
    assert not record.files[core.name].truncated
    assert (core.stat().st_uid, core.stat().st_mode & 0o077) == (0, 0)


async def test_process_that_forbids_its_core(recorder: RecorderService) -> None:
    """PR_SET_DUMPABLE 0, prctl(2), holds whatever fs.suid_dumpable says."""
    script = "import ctypes; ctypes.CDLL(None).prctl(4, 0); ctypes.string_at(0)"

    with written("/proc/sys/fs/suid_dumpable", "2"):
        pid, number = crash("/usr/bin/python3", "-c", script)

    assert number == signal.SIGSEGV
    await nothing_comes_of(recorder, pid)


@by_one_mechanism
async def test_process_that_is_traced(recorder: RecorderService) -> None:
    tracer = subprocess.Popen(
        ["/usr/bin/python3", "-c", _TRACER, crasher("null_pointer")], stdout=subprocess.PIPE
    )
    assert tracer.stdout is not None
    with tracer.stdout:
        pid = int(tracer.stdout.readline())
    assert tracer.wait(60) == signal.SIGSEGV

    record = await recorder.captured(pid)

    assert not record.files[recorder.file(pid, "core").name].truncated
    assert top(recorder, pid) == "crash_here"


@pytest.fixture
def full_cgroup() -> Iterator[Path]:
    """A memory cgroup that a heap of 64 MiB just fits in."""
    root = Path("/sys/fs/cgroup/memory")
    limit, procs = "memory.limit_in_bytes", "cgroup.procs"
    if not root.is_dir():
        root, limit = Path("/sys/fs/cgroup"), "memory.max"
    place = root / f"crashbus-test-{os.getpid()}"
    try:
        place.mkdir()
        (place / limit).write_text(str(66 * MIB))
    except OSError as error:
        lacking(f"needs a writable memory cgroup: {error}")
    yield place / procs
    place.rmdir()


@by_one_mechanism
async def test_process_at_the_limit_of_its_cgroup(
    recorder: RecorderService, full_cgroup: Path
) -> None:
    process = subprocess.Popen(
        ["/bin/sh", "-c", f'echo $$ >{full_cgroup}; exec "{crasher("heap")}" 64'],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGSEGV)
    assert process.wait(60) == -signal.SIGSEGV

    record = await recorder.captured(process.pid)

    core = recorder.file(process.pid, "core")
    assert not record.files[core.name].truncated
    assert core.stat().st_size > 64 * MIB


@by_one_mechanism
async def test_process_in_a_chroot(recorder: RecorderService, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    build(root / "program", "-static")
    before = sorted(root.rglob("*"))

    pid, record = await capture(recorder, "chroot", root, "/program")

    snapshot = json.loads(recorder.file(pid, "snapshot").read_bytes())
    assert snapshot["Root"] == str(root)
    assert record.process.executable is not None
    assert top(recorder, pid) == "crash_here"
    assert sorted(root.rglob("*")) == before  # nothing was written where it lived


def pids_in(spool: Path) -> set[int]:
    return {int(path.name) for path in spool.iterdir() if path.name.isdigit()}


@by_one_mechanism
async def test_process_in_namespaces_of_its_own(recorder: RecorderService) -> None:
    need_program("unshare")
    names = ("--user", "--map-root-user", "--pid", "--fork", "--mount", "--uts", "--ipc", "--net")
    script = 'mount -t tmpfs none /tmp 2>/dev/null; exec 2>/dev/null; cd /; exec "$0"'
    held = Path("/var/tmp") / f"crasher-{os.getpid()}"
    shutil.copy(crasher("null_pointer"), held)
    held.chmod(0o755)
    former = pids_in(recorder.spool)
    try:
        subprocess.run(["unshare", *names, "/bin/sh", "-c", script, held], timeout=20, check=False)
        # unshare ends itself by the signal that its child died of, so there are two; small ones
        # are let go before anything of them is written.
        await until(lambda: len(pids_in(recorder.spool) - former) == 2)
        records = [await recorder.captured(pid) for pid in pids_in(recorder.spool) - former]
    finally:
        held.unlink()

    (record,) = [one for one in records if one.process.comm.startswith("crasher")]
    assert record.process.ns_pid == 1 != record.process.pid
    assert top(recorder, record.process.pid) == "crash_here"
    (thread,) = json.loads(recorder.file(record.process.pid, "backtrace_json").read_bytes())[
        "threads"
    ]
    assert (thread["tid"], thread["name"]) == (1, record.process.comm)
    assert not record.files[recorder.file(record.process.pid, "core").name].truncated
