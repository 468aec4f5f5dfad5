"""What is kept of a process that the OOM killer chose."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from crashbus.parts import Oom
from services.collector import kernel_log, oom
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

    lines = oom.kernel_log(pid, at)

    assert "invoked oom-killer" in lines[0]
    assert f"illed process {pid} " in lines[-1]
    assert not any(f"illed process {another} " in line for line in lines)
    event = signal_event(os.getpid())
    why = oom.why(oom.Seen(event, Resources(), lines))
    assert "constraint=CONSTRAINT_MEMCG" in why
    assert path in why
    assert oom.kernel_log(pid, at + 3600) == ()


def test_numbers_that_the_event_lacks_are_the_log_s() -> None:
    """Kernels before 6.9 tell the detector nothing but the PID."""
    need_root()
    with memory_cgroup("numbers") as group:
        pid, at = killed_by_oom(group)
    event = signal_event(os.getpid())
    lines = oom.kernel_log(pid, at)

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


def test_only_the_kernel_s_own_lines_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root in a container may write to the log as well, with the facility of a user."""
    kernel, user = 6, 1 << 3 | 6
    # In packet mode, pipe(2), each write is one read, as with the log.
    reading, writing = os.pipe2(os.O_DIRECT)
    monkeypatch.setattr(kernel_log, "KERNEL_LOG", Path(f"/proc/self/fd/{reading}"))

    def log(facility: int, text: str) -> None:
        os.write(writing, f"{facility},1,5000000,-;{text}\n SUBSYSTEM=x\n".encode())

    try:
        log(user, "x invoked oom-killer: forged")
        log(user, "Out of memory: Killed process 42 (forged)")
        assert oom.kernel_log(42, 5.0) == ()
        log(kernel, "x invoked oom-killer: order=0")
        log(user, "oom-kill:constraint=FORGED")
        log(kernel, "Out of memory: Killed process 42 (x) total-vm:1kB")
        assert oom.kernel_log(42, 5.0) == (
            *("x invoked oom-killer: order=0", "Out of memory: Killed process 42 (x) total-vm:1kB"),
        )
    finally:
        os.close(reading)
        os.close(writing)


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
