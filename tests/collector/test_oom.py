"""What is kept of a process that the OOM killer chose."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crashbus import Bus, SignalEvent
from crashbus.parts import Oom
from services.collector import deaths, kernel_log, oom
from services.collector.deaths import Deaths
from services.collector.gather import Gatherer
from services.common.capture import read
from services.common.resources import Resources
from tests.collector.stand_in import signal_event
from tests.support.cgroup import cgroup_path, limit, memory_cgroup
from tests.support.crashers import crasher
from tests.support.requirements import need_root
from tests.support.victim import Victim


def killed_by_oom(group: Path) -> tuple[int, float]:
    """Run a process into its memory limit; return its PID and the monotonic time."""
    limit(group, 32 * 1024**2)
    victim = Victim(crasher("memory_hog"))
    (group / "cgroup.procs").write_text(str(victim.pid))
    victim.go().process.communicate(timeout=30)
    assert victim.process.returncode == -signal.SIGKILL
    return victim.pid, time.monotonic()


def test_kernel_s_log_tells_why_it_was_chosen() -> None:
    need_root()
    with memory_cgroup("oom") as group:
        path = cgroup_path(group)
        pid, at = killed_by_oom(group)
        another, _ = killed_by_oom(group)

    lines = oom.kernel_log(pid, path, at)

    assert "invoked oom-killer" in lines[0]
    assert f"illed process {pid} " in lines[-1]
    assert not any(f"illed process {another} " in line for line in lines)
    event = signal_event(os.getpid())
    why = oom.why(oom.Seen(event, Resources(), lines))
    assert "constraint=CONSTRAINT_MEMCG" in why
    assert path in why
    assert oom.kernel_log(pid, path, at + 3600) == ()


def test_numbers_that_the_event_lacks_are_the_log_s() -> None:
    """Kernels before 6.9 tell the detector nothing but the PID."""
    need_root()
    with memory_cgroup("numbers") as group:
        pid, at = killed_by_oom(group)
    event = signal_event(os.getpid())
    lines = oom.kernel_log(pid, None, at)

    seen = oom.Seen(event.model_copy(update={"oom": Oom()}), Resources(), lines)
    found = oom.chosen(seen)

    assert found is not None
    assert found.anon_rss_kib is not None and found.total_vm_kib is not None
    assert 24 * 1024 < found.anon_rss_kib <= 32 * 1024 < found.total_vm_kib
    assert found.oom_score_adj == int(Path("/proc/self/oom_score_adj").read_text())
    assert oom.chosen(oom.Seen(event, Resources(), lines)) is None
    told = Oom(total_vm_kib=1)
    assert oom.chosen(oom.Seen(event.model_copy(update={"oom": told}), Resources(), lines)) == told


@pytest.mark.parametrize("line", ["", "Killed process 1 (total-vm:1kB, a) and no more"])
def test_log_without_numbers_leaves_them_out(line: str) -> None:
    event = signal_event(os.getpid()).model_copy(update={"oom": Oom()})
    assert oom.chosen(oom.Seen(event, Resources(), (line,))) == Oom()


Log = Callable[..., None]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """Writes to a log that is read in the kernel's place, once."""
    # In packet mode, pipe(2), each write is one read, as with the log.
    reading, writing = os.pipe2(os.O_DIRECT)
    monkeypatch.setattr(kernel_log, "KERNEL_LOG", Path(f"/proc/self/fd/{reading}"))

    def write(*lines: str, facility: int = 6, at: float = 5.0) -> None:
        for text in lines:
            record = f"{facility},1,{int(at * 1e6)},-;{text}\n SUBSYSTEM=x\n"
            os.write(writing, record.encode())

    yield write
    os.close(reading)
    os.close(writing)


def kill(pid: int, cgroup: str = "/a/b") -> list[str]:
    """Return what the kernel writes of one kill; mm/oom_kill.c."""
    return [
        "x invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0",
        "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,"
        f"oom_memcg=/a,task_memcg={cgroup},task=x,pid={pid},uid=0",
        end(pid),
    ]


def end(pid: int) -> str:
    return f"Memory cgroup out of memory: Killed process {pid} (x) total-vm:1kB, anon-rss:1kB"


def test_only_the_kernel_s_own_lines_count(log: Log) -> None:
    """Root in a container may write to the log as well, with the facility of a user."""
    user = 1 << 3 | 6
    log(*kill(42), facility=user)
    assert oom.kernel_log(42, None, 5.0) == ()
    first, *rest = kill(42)
    log(first)
    log("oom-kill:constraint=FORGED,pid=42,uid=0", facility=user)
    log(*rest)
    assert oom.kernel_log(42, None, 5.0) == (first, *rest)


@pytest.mark.parametrize("forged", [f"x: {end(42)}", f"oom-kill:task_memcg=/{end(42)}"])
def test_name_like_a_line_is_no_kill(log: Log, forged: str) -> None:
    log(forged)
    assert oom.kernel_log(42, None, 5.0) == ()


@pytest.mark.parametrize("log_s_clock", [time.CLOCK_MONOTONIC, time.CLOCK_MONOTONIC_RAW])
def test_log_s_clock_may_have_drifted_since_the_boot(
    log: Log, log_s_clock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same PID can have died an hour before, which so little drift cannot be."""
    months = 300 * 86400.0
    clocks = {time.CLOCK_MONOTONIC: months, time.CLOCK_MONOTONIC_RAW: months - 1000}
    monkeypatch.setattr(time, "clock_gettime", clocks.__getitem__)
    log(*kill(42), at=clocks[log_s_clock] - 5)
    log(*kill(42, "/of/another"), at=clocks[log_s_clock] - 3600)
    assert oom.kernel_log(42, None, months) == tuple(kill(42))


def test_kill_of_which_the_kernel_tells_the_end_alone_has_no_other_s_reason(log: Log) -> None:
    """It keeps quiet of the rest when there are many; __ratelimit(), mm/oom_kill.c."""
    log(*kill(41), end(42))
    assert oom.kernel_log(42, "/a/b", 5.0) == (end(42),)


@pytest.mark.parametrize(("cgroup", "is_theirs"), [("/a/b/c", True), ("/a/b", True), ("/a", False)])
def test_whole_group_has_the_reason_of_the_one(log: Log, cgroup: str, is_theirs: bool) -> None:
    group = "Tasks in /a/b are going to be killed due to memory.oom.group set"
    report = (*kill(41), group, end(42))
    log(*report)
    assert oom.kernel_log(42, cgroup, 5.0) == (report if is_theirs else (end(42),))


def test_last_kill_of_a_pid_is_told(log: Log) -> None:
    earlier = kill(42, "/earlier")
    log(*earlier, *kill(42))
    assert oom.kernel_log(42, None, 5.0) == tuple(kill(42))


def test_log_is_read_where_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pod of Kubernetes."""
    need_root()
    with memory_cgroup("syslog") as group:
        path = cgroup_path(group)
        pid, at = killed_by_oom(group)
    told = oom.kernel_log(pid, path, at)

    monkeypatch.setattr(kernel_log, "KERNEL_LOG", Path("/nowhere"))

    assert oom.kernel_log(pid, path, at) == told
    assert "constraint=CONSTRAINT_MEMCG" in "".join(told)


def test_bundle_of_a_process_that_is_gone(tmp_path: Path) -> None:
    need_root()
    process = subprocess.Popen(["sleep", "60"])
    event = signal_event(process.pid)
    process.kill()
    process.wait()

    seen = oom.look(event)
    oom.write(seen, tmp_path / "spool")

    directory = tmp_path / "spool" / str(process.pid)
    (record,) = directory.glob("capture_*")
    with record.open("rb") as file:
        found = read(file.fileno())
    assert (found.state, found.crash_id) == ("complete", event.crash_id)
    (snapshot,) = directory.glob("snapshot_*")
    assert json.loads(snapshot.read_bytes())["Pid"] == process.pid
    assert {path.name for path in directory.iterdir()} == {*found.files, record.name}


def test_resources_of_another_process_with_the_pid_are_not_taken() -> None:
    event = signal_event(os.getpid())
    earlier = event.process.model_copy(update={"start_ticks": event.process.start_ticks - 1})

    assert oom.look(event).resources.status
    assert not oom.look(event.model_copy(update={"process": earlier})).resources.status


async def test_kill_that_a_process_outlived_is_forgotten(
    gatherer: Gatherer, bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each would take memory for as long as the collector runs."""
    monkeypatch.setattr(deaths, "PATIENCE", 0.01)
    ledger = gatherer._entering._ledger
    following = Deaths("test-host", (), bus, ledger, gatherer, tmp_path / "watched", 0)
    event = signal_event(os.getpid(), "oom_kill")
    waits = event.model_copy(update={"event_id": "waits"})
    is_over = event.model_copy(update={"time": event.time - 2 * deaths.GIVE_UP})
    for one in (waits, is_over):
        await bus.publish(one)

    async for delivery in bus.consume(SignalEvent, "deaths", service="collector"):
        await following._follow(delivery)
        assert list(following._oom_kills) == ["waits"]
        if delivery.message.event_id == is_over.event_id:
            break
