"""What is kept of a process that the OOM killer chose."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from crashbus.capture import read
from services.collector import oom
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


def test_only_the_kernel_s_own_lines_count() -> None:
    need_root()
    pid = 4194304
    Path("/dev/kmsg").write_text(f"Memory cgroup out of memory: Killed process {pid} (forged) ")

    assert oom.kernel_log(pid, time.monotonic()) == ()


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
