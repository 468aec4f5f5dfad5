"""core_pattern while a recorder starts and stops, is killed, or finds another."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.recorder import core_pattern as ours
from tests.recorder.conftest import MakeRecorder
from tests.support import core_pattern
from tests.support.crashers import crasher
from tests.support.disk import tmpfs
from tests.support.recorder import crash
from tests.support.requirements import need_program, need_root
from tests.support.wait import until


@pytest.fixture
def kept() -> Iterator[None]:
    """core_pattern, put back at the end."""
    with core_pattern.core_pattern_kept():
        yield


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
@pytest.mark.parametrize(
    ("result", "status", "keeps"),
    [
        ("signal", "KILL", True),
        ("exit-code", "1", True),
        ("exit-code", "2", False),  # RestartPreventExitStatus=
        ("timeout", "KILL", False),  # of a stop
        ("success", "0", False),
    ],
)
async def test_pipe_helper_keeps_crashes_while_systemd_starts_a_recorder_again(
    recorder_with: MakeRecorder, mechanism: str, result: str, status: str, keeps: bool
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with(recorder_mechanism=mechanism)
    await recorder.start()
    recorder.kill_with_watchdogs()
    command = [
        ".venv/bin/python", "-m", "services.recorder.core_pattern",
        "--restore", "--state", str(recorder.state),
    ]  # fmt: skip

    told = {"SERVICE_RESULT": result, "EXIT_STATUS": status}
    subprocess.run(command, check=True, env=os.environ | told)

    helper = recorder.state / "recorder" / "corepipe"
    assert core_pattern.current().startswith(f"|{helper} " if keeps else "/somewhere")
    assert helper.exists() is keeps


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_core_pattern_is_put_back_after_sigterm(
    recorder_with: MakeRecorder, mechanism: str
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    before = core_pattern.pipe_limit()
    recorder = recorder_with(recorder_mechanism=mechanism)
    await recorder.start()
    helper = recorder.state / "recorder" / "corepipe"
    assert helper.exists()

    assert recorder.stop() == 0

    assert core_pattern.current() == "/somewhere/core.%p"
    assert core_pattern.pipe_limit() == before
    assert not helper.exists()
    assert "old=/somewhere/core.%p" in recorder.log


async def test_core_pattern_of_before_survives_a_killed_recorder_and_watchdog(
    recorder_with: MakeRecorder,
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with(recorder_mechanism="socket")
    await recorder.start()
    recorder.kill_with_watchdogs()
    assert core_pattern.current().startswith("@")

    await recorder.start()
    recorder.stop()

    assert core_pattern.current() == "/somewhere/core.%p"


def test_file_of_a_version_without_a_stand_in_names_the_helper_it_left_crashes_to(
    kept: None, tmp_path: Path
) -> None:
    theirs = f"|{tmp_path}/recorder/corepipe /run/s %P %I %s %t"
    saved = {"pattern": "/somewhere/core.%p", "pipe_limit": 0, "ours": theirs}
    (tmp_path / "recorder").mkdir(mode=0o700)
    (tmp_path / "recorder" / "core_pattern.json").write_text(json.dumps(saved))
    core_pattern.set_pattern(theirs)

    assert ours.leave_to_helper(tmp_path)
    assert ours.keeps_crashes(tmp_path)


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
@pytest.mark.parametrize(("lost", "before"), [(False, "/somewhere/core.%p"), (True, "core")])
async def test_core_pattern_of_before_a_killed_recorder_with_another_state_is_put_back(
    recorder_with: MakeRecorder, mechanism: str, lost: bool, before: str
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    killed = recorder_with(recorder_mechanism=mechanism)
    await killed.start()
    killed.kill()
    helper = killed.state / "recorder" / "corepipe"
    await until(lambda: core_pattern.current().startswith(f"|{helper} "), 60)
    if lost:
        helper.with_name("core_pattern.json").unlink()
    recorder = recorder_with(recorder_mechanism=mechanism)
    assert ours.former(recorder.state) == before

    await recorder.start()
    recorder.stop()

    assert core_pattern.current() == before
    assert ("nothing says what was before it" in recorder.log) is lost


async def test_core_pattern_can_be_put_back_without_a_recorder(
    recorder_with: MakeRecorder,
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with()
    await recorder.start()
    command = [
        ".venv/bin/python", "-m", "services.recorder.core_pattern",
        "--restore", "--state", str(recorder.state),
    ]  # fmt: skip

    refused = subprocess.run(command, capture_output=True, text=True)
    recorder.kill_with_watchdogs()
    subprocess.run(command, check=True, capture_output=True)

    assert "a recorder runs on this host already" in refused.stderr
    assert core_pattern.current() == "/somewhere/core.%p"


async def test_pattern_that_somebody_else_set_meanwhile_stays(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await recorder.start()
    core_pattern.set_pattern("/theirs/core")
    await until(lambda: "core_pattern was changed" in recorder.log)

    assert recorder.stop() == 0

    assert core_pattern.current() == "/theirs/core"


async def test_other_handler_is_named_when_it_is_replaced(recorder_with: MakeRecorder) -> None:
    core_pattern.set_pattern("|/bin/false %P")
    recorder = recorder_with()

    await recorder.start()

    assert re.search(r"taking over from another handler.*handler=false", recorder.log)


async def test_second_recorder_with_the_same_state_is_refused(
    recorder_with: MakeRecorder,
) -> None:
    first = recorder_with()
    second = recorder_with(state=first.state)
    await first.start()

    second.launch()
    assert second.process is not None
    assert second.process.wait(60) == 2

    assert "a recorder runs on this host already" in second.log
    assert "Traceback" not in second.log
    pid, _ = crash(crasher("null_pointer"))
    await first.captured(pid)


async def test_state_that_others_may_write_to_is_refused(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    (tmp_path / "recorder").mkdir()
    (tmp_path / "recorder").chmod(0o777)
    before = core_pattern.current()
    recorder = recorder_with(state=tmp_path, recorder_mechanism="pipe")

    recorder.launch()
    assert recorder.process is not None

    assert recorder.process.wait(60) == 2
    assert "others may write to" in recorder.log
    assert core_pattern.current() == before


@pytest.fixture
def disk_without_programs() -> Iterator[Path]:
    with (
        # core_pattern takes 127 characters.
        tempfile.TemporaryDirectory(prefix="cb-", dir="/tmp") as place,
        tmpfs(Path(place) / "state", "noexec,mode=700") as state,
    ):
        yield state


async def test_state_on_a_disk_without_programs_is_refused_with_the_pipe_helper(
    disk_without_programs: Path, recorder_with: MakeRecorder
) -> None:
    before = core_pattern.current()
    recorder = recorder_with(state=disk_without_programs, recorder_mechanism="pipe")

    recorder.launch()
    assert recorder.process is not None

    assert recorder.process.wait(60) == 2
    assert "noexec" in recorder.log
    assert core_pattern.current() == before


async def test_no_helper_stands_in_from_a_disk_without_programs(
    disk_without_programs: Path, recorder_with: MakeRecorder
) -> None:
    core_pattern.set_pattern("/somewhere/core.%p")
    recorder = recorder_with(state=disk_without_programs, recorder_mechanism="socket")
    await recorder.start()
    assert "crashes while no recorder is there will not be kept" in recorder.log

    recorder.kill()

    await until(lambda: core_pattern.current() == "/somewhere/core.%p", 60)


# A host, which its first process sees, and a container's mount of the same directory in it.
_HOST = """
mount -t tmpfs -o $1 tmpfs "$3" && install -m 700 /bin/true "$3/corepipe"
unshare --mount sh -c 'mount -o remount,bind,$2 "$3" && "$4" -c "$5"' - "$@"
exit $?
"""
# A host's link to another disk, where the container has what it leads to.
_HOST_WITH_LINK = """
ln -s /nonexistent "$1/state"
unshare --mount sh -c 'mount -t tmpfs tmpfs "$1" &&
  install -D -m 700 /bin/true "$1/state/corepipe" && "$2" -c "$3"' - "$@"
exit $?
"""
_ASK = """
from pathlib import Path
from services.recorder.handover.takeover import kernel_can_start
print(kernel_can_start(Path("{}/corepipe")), kernel_can_start(Path("{}/nothing")))
"""


@pytest.mark.parametrize(("host", "container"), [("noexec", "exec"), ("exec", "noexec")])
def test_whether_the_kernel_can_start_the_helper_is_for_the_host_to_tell(
    tmp_path: Path, host: str, container: str
) -> None:
    need_root()
    need_program("unshare")
    ask = _ASK.replace("{}", str(tmp_path))
    told = _as_first_process(_HOST, host, container, str(tmp_path), sys.executable, ask)

    assert told == f"{host == 'exec'} False\n"


def test_link_of_the_host_is_no_reason_not_to_start_the_helper(tmp_path: Path) -> None:
    need_root()
    need_program("unshare")
    ask = _ASK.format(tmp_path / "state", tmp_path)

    told = _as_first_process(_HOST_WITH_LINK, str(tmp_path), sys.executable, ask)

    assert told == "True False\n"


def _as_first_process(script: str, *arguments: str) -> str:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script, "-", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
