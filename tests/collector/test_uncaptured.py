"""Deaths that the kernel dumps no core of: letter and manifest say why, and what mends it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from crashbus import DeadLetter, Manifest
from services.collector import uncaptured
from services.collector.uncaptured import Host
from tests.collector.conftest import Setup
from tests.collector.stand_in import signal_event
from tests.detector.watching import Watch
from tests.support.core_pattern import core_pattern_kept, set_pattern
from tests.support.requirements import lacking, need_btf, need_root
from tests.support.wait import until

DIES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
FORBIDS = f"import ctypes; ctypes.CDLL(None).prctl(4, 0); {DIES}"
HELPER = """#!/bin/sh
[ "$1" = held ] || exit 0
echo $$ > "$0.new"
/bin/mv "$0.new" "$0.pid"
exec /bin/sleep 120
"""
HELD = f"open('/proc/self/comm', 'w').write('held'); {DIES}"
CHANGES_USER = f"import os; os.setgroups([]); os.setresuid(65534, 65534, 65534); {DIES}"
PIPE_LIMIT = Path("/proc/sys/kernel/core_pipe_limit")
SUID_DUMPABLE = Path("/proc/sys/fs/suid_dumpable")


@pytest.fixture
def program() -> Iterator[Path]:
    """A pipe helper that holds what is named "held" until it is ended; its PID is beside it."""
    with tempfile.TemporaryDirectory(prefix="cb-", dir="/tmp") as directory:
        helper = Path(directory) / "helper"
        helper.write_text(HELPER)
        helper.chmod(0o755)
        with core_pattern_kept():
            set_pattern(f"|{helper} %e")
            PIPE_LIMIT.write_text("1")
            yield (pid := helper.with_suffix(".pid"))
            if pid.exists():
                with suppress(ProcessLookupError):
                    os.kill(int(pid.read_text()), signal.SIGTERM)


@pytest.fixture
async def seen(setup: Setup, program: Path, tmp_path: Path) -> AsyncIterator[Watch]:
    """A detector and a collector that runs."""
    need_root()
    need_btf()
    watch = Watch(tmp_path / "watch")
    await setup.collector.start()
    await setup.collector.healthy()
    yield watch
    watch.close()


def dying(code: str, limit: str = "unlimited") -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["prlimit", f"--core={limit}", sys.executable, "-c", code])


async def told(setup: Setup, seen: Watch, pid: int) -> tuple[str, str]:
    """Return the reason, which letter and manifest agree on, and what would mend it."""
    event = await seen.event(pid)
    await setup.bus.publish(event)

    async def both() -> tuple[DeadLetter, Manifest] | None:
        letters = [m for m in await setup.bus.stored(DeadLetter) if m.crash_id == event.crash_id]
        manifests = [m for m in await setup.bus.stored(Manifest) if m.crash_id == event.crash_id]
        return (letters[0], manifests[0]) if letters and manifests else None

    letter, manifest = await until(both, 30)
    assert letter.reason == "not_captured"
    assert manifest.notes == (letter.error,)
    return letter.error, letter.mend


async def test_process_that_forbade_its_core_is_told_so(setup: Setup, seen: Watch) -> None:
    process = dying(FORBIDS)
    process.wait()

    why, mend = await told(setup, seen, process.pid)

    assert "the kernel refused a core" in why and "prctl(PR_SET_DUMPABLE, 0)" in why
    assert "no setting of the host changes that" in mend
    assert ("sysctl" in mend) is (SUID_DUMPABLE.read_text().strip() == "0")


async def test_process_that_became_another_user_is_told_so(setup: Setup, seen: Watch) -> None:
    if SUID_DUMPABLE.read_text().strip() != "0":
        lacking("needs fs.suid_dumpable to be 0")
    process = dying(CHANGES_USER)
    process.wait()

    why, mend = await told(setup, seen, process.pid)

    assert "fs.suid_dumpable is 0 and it runs as another user" in why
    assert mend.startswith("sysctl fs.suid_dumpable=2")


async def test_limit_that_pipes_obey_is_told(setup: Setup, seen: Watch) -> None:
    process = dying(DIES, limit="1")
    process.wait()

    why, mend = await told(setup, seen, process.pid)

    assert "whose RLIMIT_CORE is 1" in why
    assert "LimitCORE=" in mend and "CRASHBUS_RECORDER_MECHANISM" in mend


def _is_held_or_ended(program: Path, process: "subprocess.Popen[bytes]") -> bool:
    return program.exists() or process.poll() is not None


async def test_more_crashes_than_the_kernel_pipes_at_once_are_told(
    setup: Setup, seen: Watch, program: Path
) -> None:
    is_held = program.exists
    while not is_held():  # other crashes of this machine may have the place first
        held = dying(HELD)
        await until(partial(_is_held_or_ended, program, held))
    over = dying(DIES)
    over.wait()

    why, mend = await told(setup, seen, over.pid)

    assert held.poll() is None
    os.kill(int(program.read_text()), signal.SIGTERM)
    held.wait()
    assert "over core_pipe_limit" in why
    assert "sysctl kernel.core_pipe_limit" in mend


def test_advice_fits_what_is_known() -> None:
    event = signal_event(os.getpid())

    def advice(host: Host, told: str | None = None, **known: object) -> tuple[str, str]:
        return uncaptured.explain(event.model_copy(update=known), host, told)

    why, mend = advice(Host(False, "2"), dumpable=0, core_limit=0)
    assert "the process forbade its own" in why and "another user" not in why
    assert "sysctl" not in mend
    why, mend = advice(Host(False, "0"), dumpable=0, core_limit=0)
    assert "another user" in why and "forbade its own" in why
    assert "sysctl fs.suid_dumpable=2, if" in mend and "no setting of the host" in mend
    # The socket knows no limit, and with any other than 1 a pipe does not either.
    for host, limit in ((Host(False, "2"), 1), (Host(True, "2"), 0), (Host(True, "2"), 4096)):
        assert "RLIMIT" not in advice(host, dumpable=1, core_limit=limit)[0]
    why, mend = advice(Host(False, "2"), "Coredump socket failed", dumpable=1)
    assert why.endswith("the kernel says 'Coredump socket failed'") and "doctor" in mend
    # A detector of an older version, or another's kernel, does not say.
    assert "sysctl fs.suid_dumpable=2, if" in advice(Host(False, "0"))[1]
    assert "sysctl" not in advice(Host(False, "2"))[1]


def test_kernels_word_is_of_this_very_process() -> None:
    event = signal_event(os.getpid())
    process = event.process.model_copy(update={"ns_pid": 12, "comm": "a (b.c"})
    event = event.model_copy(update={"process": process, "monotonic_ns": int(100e9)})

    def said(line: str, at: float = 100.5) -> str | None:
        return uncaptured.said_of(event, [(at, line)])

    over = "over core_pipe_limit, skipping core dump"
    assert said(f"coredump: 12(a (b.c): {over}") == over
    assert said("Pid 12(a (b.c) over core_pipe_limit") == "over core_pipe_limit"
    assert said("Process 12(a (b.c) has RLIMIT_CORE set to 1") == "has RLIMIT_CORE set to 1"
    assert said(f"coredump: 112(a (b.c): {over}") is None
    assert said(f"coredump: 12(a (bxc): {over}") is None
    assert said(f"x coredump: 12(a (b.c): {over}") is None
    assert said(f"coredump: 12(a (b.c): {over}", at=200) is None

    lines = [(99.0, f"coredump: 12(a (b.c): {text}") for text in ("earlier", "last")]
    assert uncaptured.said_of(event, lines) == "last"
