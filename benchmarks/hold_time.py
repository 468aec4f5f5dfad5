"""How long a crashing process is held: from its fatal signal until its parent's waitpid returns.

By turns with the kernel writing a plain core file, with Crashbus, and with Debian's
systemd-coredump, all on the same disk; the least time of each counts, and its median tells how
usual that is. Needs root and some 12 GiB of memory and disk. Real programs are measured where they
are installed: Debian's nodejs, default-jdk-headless, and postgresql with its directory of programs
on the PATH::

    .venv/bin/python -m benchmarks.hold_time [--only TITLE]… [--rounds N] [--without-systemd] [MiB]

A few rows, measured often, tell of a change::

    .venv/bin/python -m benchmarks.hold_time --only "incompressible 1 MiB" --rounds 30
"""

import argparse
import asyncio
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

from tests.support import core_pattern, systemd_coredump
from tests.support.crashers import crasher
from tests.support.recorder import RecorderService, crash

ROUNDS = 3
SIZES = (1, 64, 1024, 4096)  # MiB
_FILL = 512  # MiB, about, that a real program's heap gets

Start = Callable[[], "subprocess.Popen[bytes]"]

_PYTHON = "d={i: [str(i), float(i)] for i in range(2500000)}; print('ready', flush=True); input()"
_NODE = (
    "const a=[]; for (let i=0;i<4e6;i++) a.push({id:i,name:'n'+i,tags:[i,i+1]});"
    "console.log('ready'); setInterval(()=>a.length,1e6)"
)
_JAVA = """
import java.util.*;
public class Heap {
    public static void main(String[] a) throws Exception {
        var map = new HashMap<Integer, String>();
        for (int i = 0; i < 4_000_000; i++) map.put(i, "value " + i);
        System.out.println("ready");
        Thread.sleep(1_000_000 + map.size());
    }
}
"""
_SQL = (
    b"create table t as select i, md5(i::text) as text from generate_series(1, 5000000) i\n"
    b"select 'ready'\n"
)


def main() -> None:
    asked = _arguments()
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(
        f"seconds held, least/median of {asked.rounds} rounds; in brackets: Crashbus's share of it"
    )
    print(f"{'memory':24}{'core MiB':>9}{'Crashbus':>16}{'plain file':>30}{'systemd-coredump':>30}")
    with tempfile.TemporaryDirectory(prefix="hold-") as name, core_pattern.core_pattern_kept():
        place = Path(name)
        place.chmod(0o755)
        for title, start in programs(place, asked.largest):
            if not asked.only or title in asked.only:
                measure(title, start, place, asked.rounds, not asked.without_systemd)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hold_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("largest", nargs="?", type=int, default=SIZES[-1], help="MiB")
    parser.add_argument("--only", action="append", metavar="TITLE", help="of a row")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--without-systemd", action="store_true", help="leave out its handler, which takes longest"
    )
    return parser.parse_args()


def programs(place: Path, largest: int) -> Iterator[tuple[str, Start]]:
    """Give what crashes, by name; each says a line when it is full."""
    for size in (size for size in SIZES if size <= largest):
        yield f"incompressible {size} MiB", _starter(crasher("heap"), str(size))
    yield "Python", _starter("/usr/bin/python3", "-c", _PYTHON)
    if shutil.which("node"):
        yield "Node.js", _starter("node", "--max-old-space-size=4096", "-e", _NODE)
    if shutil.which("java"):
        source = place / "Heap.java"
        source.write_text(_JAVA)
        subprocess.run(["javac", "-d", place, source], check=True)
        yield "JVM", _starter("java", "-Xmx2g", "-Xms512m", "-cp", str(place), "Heap")
    if shutil.which("initdb"):
        yield "PostgreSQL", _postgres(place / "postgres")


def _starter(*command: str | Path) -> Start:
    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/tmp",
        )

    return start


def _postgres(data: Path) -> Start:
    """One server process by itself, with its shared buffers; it refuses to run as root."""
    nobody = 65534
    data.mkdir()
    os.chown(data, nobody, nobody)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(["initdb", "-D", data], user=nobody, check=True, cwd=data, **quiet)  # type: ignore[call-overload]
    options = ["-c", f"shared_buffers={_FILL}MB", "-c", "max_wal_size=4GB"]

    def start() -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            ["postgres", "--single", "-D", data, *options, "postgres"],
            user=nobody,
            cwd=data,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdin is not None
        process.stdin.write(b"drop table if exists t\n" + _SQL)
        process.stdin.flush()
        return process

    return start


def measure(title: str, start: Start, place: Path, rounds: int, against_systemd: bool) -> None:
    """Print one row."""
    ours, plain, systemd = [], [], []
    size = 0
    for _ in range(rounds):
        with plain_file(place) as size_of:
            plain.append(held(start))
            size = size_of()
        ours.append(asyncio.run(with_crashbus(start)))
        if against_systemd:
            with with_systemd(place) as available:
                if available:
                    systemd.append(held(start))
    columns = f"{title:24}{size >> 20:>9}{min(ours):>9.4f}/{median(ours):.4f}"
    for others in (plain, systemd):
        columns += _beside(ours, others) if others else f"{'-':>30}"
    print(columns, flush=True)


def _beside(ours: list[float], others: list[float]) -> str:
    shares = [of(ours) / of(others) for of in (min, median)]
    times = f"{min(others):.4f}/{median(others):.4f}"
    return f"{times + ' ({:.2f}/{:.2f})'.format(*shares):>30}"


def held(start: Start) -> float:
    """Return the seconds from a process's fatal signal until its parent knows its end."""
    process = start()
    assert process.stdout is not None
    while b"ready" not in (line := process.stdout.readline()):
        if not line:
            raise RuntimeError(f"{process.args!r} ended with {process.wait()}")
    os.sync()
    before = time.monotonic()
    process.send_signal(signal.SIGABRT)
    # Not process.wait(600): with a time limit it looks again after 0.5, 1, 2, 4… milliseconds.
    _, status = os.waitpid(process.pid, 0)
    took = time.monotonic() - before
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    with suppress(BrokenPipeError):
        if process.stdin is not None:
            process.stdin.close()
    return took


@contextmanager
def plain_file(place: Path) -> Iterator[Callable[[], int]]:
    """Have the kernel write cores to files; yields how to ask for the size of the last."""
    cores = place / "cores"
    cores.mkdir()
    cores.chmod(0o777)
    core_pattern.set_pattern(f"{cores}/core")
    try:
        yield lambda: sum(path.stat().st_size for path in cores.iterdir())
    finally:
        shutil.rmtree(cores)
        os.sync()


async def with_crashbus(start: Start) -> float:
    """Return how long a recorder with its defaults holds the process."""
    recorder = RecorderService()
    try:
        await recorder.start()
        # As on a host that has seen one, and is done with it.
        await recorder.captured(crash(crasher("null_pointer"))[0])
        return await asyncio.to_thread(held, start)
    finally:
        await asyncio.to_thread(recorder.close)
        os.sync()


@contextmanager
def with_systemd(place: Path) -> Iterator[bool]:
    """Put systemd's handler in place, as its units do; tells whether it can be had."""
    if not systemd_coredump.available():
        yield False
        return
    with systemd_coredump.systemd_coredump(place) as pattern:
        core_pattern.set_pattern(pattern)
        Path("/proc/sys/kernel/core_pipe_limit").write_text("16")
        yield True
    os.sync()


if __name__ == "__main__":
    main()
