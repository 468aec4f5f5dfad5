"""Who leaves a core, and how much of it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crashbus import layout, own_cores
from crashbus.parts import Container, Process
from services.recorder.core import core_policy
from services.recorder.core.core_policy import CorePolicy, Extent, Rule
from services.recorder.settings import RecorderSettings
from tests.recorder.conftest import MakeRecorder
from tests.support.crashers import crasher
from tests.support.recorder import crash
from tests.support.wait import until


def process(
    executable: str = "/bin/x",
    uid: int = 0,
    container: str = "",
    label: str | None = None,
    arguments: tuple[str, ...] = (),
) -> Process:
    labels = {} if label is None else {"vault": label}
    return Process(
        boot_id="b",
        pid=1,
        ns_pid=1,
        start_ticks=1,
        uid=uid,
        gid=0,
        comm="x",
        executable=executable,
        command_line=arguments,
        container=Container(
            id=container,
            runtime="docker",
            name=None if label is None else "named",
            labels=labels,
        )
        if container
        else None,
    )


@pytest.mark.parametrize(
    ("rule", "fitting", "other"),
    [
        ("executable=/usr/bin/vault*", process("/usr/bin/vault-1"), process("/opt/usr/bin/vault")),
        ("executable=*/vault", process("/opt/vault"), process("/opt/vaults")),
        ("argument=*/vault.py", process(arguments=("py", "/a/vault.py")), process("/a/vault.py")),
        ("argument=x", process(arguments=("x",)), process(arguments=("xx", "x=x"))),
        ("user=1000", process(uid=1000), process(uid=100)),
        ("user=alice", process(uid=1000), process(uid=0)),
        ("container=abc", process(container="abcdef"), process(container="xabc")),
        ("container=abc", process(container="abc"), process()),
        ("label=vault", process(container="a", label="x"), process()),
        ("label=vault=x", process(container="a", label="x"), process(container="a", label="y")),
        # Labels that nobody told may be any.
        ("label=vault=x", process(container="a"), process(container="a", label="y")),
    ],
)
def test_rules(rule: str, fitting: Process, other: Process) -> None:
    policy = CorePolicy(Extent.ALL, (Rule.parse(f" {rule} "),))
    names = {1000: "alice", 0: "root", 100: "bob"}

    assert policy.decide(fitting, names[fitting.uid]).extent is Extent.NOTHING
    assert policy.decide(other, names[other.uid]).extent is Extent.ALL


@pytest.mark.parametrize("text", ["", "user", "user=", "=x", "pod=x", "users=x"])
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(ValueError, match="is no rule"):
        Rule.parse(text)


@pytest.mark.parametrize("name", own_cores.NAMES)
def test_our_own_processes_are_known_by_the_name_that_they_give_themselves(name: str) -> None:
    policy = CorePolicy(Extent.ALL, RecorderSettings().core_off_rules)
    like_ours = process(arguments=("python", "-m", "services.shipper", "/opt/bin/crashbus"))

    assert policy.decide(like_ours, "root").extent is Extent.ALL
    ours = like_ours.model_copy(update={"comm": name})
    assert policy.decide(ours, "root").extent is Extent.NOTHING


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_loop_leaves_one_whole_core_in_some() -> None:
    clock = Clock()
    policy = CorePolicy(Extent.ALL, (), burst=3, one_in=4, clock=clock)

    def whole(one: Process) -> bool:
        return policy.decide(one, "root").extent is Extent.ALL

    looping = [whole(process()) for _ in range(11)]

    assert looping == [True] * 3 + [False, False, False, True] * 2
    assert whole(process("/bin/y"))
    assert whole(process(uid=7))
    assert whole(process(container="abc"))
    clock.now += core_policy.LOOP_SECONDS + 1
    assert [whole(process()) for _ in range(4)] == [True, True, True, False]


def test_programs_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_policy, "_MAX_PROGRAMS", 5)
    policy = CorePolicy(Extent.ALL, (), burst=1, one_in=10)
    for number in range(100):
        for _ in range(3):
            policy.decide(process(f"/bin/{number}"), "root")

    assert len(policy._crashes) == len(policy._in_loop) == 5


async def test_switched_off_core_leaves_a_backtrace_and_no_memory(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with(recorder_core_off="user=nobody, executable=*/threads")
    await recorder.start()

    pid, _ = crash(crasher("threads"), env={"KEPT": "a-secret-of-mine"})
    record = await recorder.captured(pid)
    other, _ = crash(crasher("null_pointer"))

    assert not list((recorder.spool / str(pid)).glob("*core*"))
    assert "no core for executable=*/threads" in record.notes[0]
    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    assert found["threads"][0]["frames"][0]["symbol"] == "crash_here"
    assert len(found["threads"]) > 2
    assert found["threads"][0]["frames"][-1]["module"] is not None
    await recorder.captured(other)
    assert recorder.file(other, "core").stat().st_size > 100_000


async def test_crash_loop_keeps_its_stacks(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with(recorder_loop_burst=2, recorder_loop_one_in=3)
    await recorder.start()

    records = []
    for _ in range(6):
        pid, _ = crash(crasher("threads"))
        records.append((pid, await recorder.captured(pid)))

    kept = [record.files[recorder.file(pid, "core").name] for pid, record in records]
    assert [file.truncated for file in kept] == [False, False, True, True, False, True]
    assert "more than 2 crashes of this program within a minute" in (kept[2].note or "")
    for pid, _ in records:
        assert "crash_here" in recorder.file(pid, "backtrace").read_text()


async def test_wrong_rule_is_told_at_the_start(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with(recorder_core_off="program=x")

    with pytest.raises(RuntimeError, match="'program=x' is no rule"):
        await recorder.start()


_SECRET = "wJalrXUtnFEMI-correct-horse-battery"


def start_shipper(log: Path) -> subprocess.Popen[bytes]:
    """A real one, which waits for a bus."""
    settings = {
        "NATS_URL": "nats://127.0.0.1:1",
        "NATS_PASSWORD": _SECRET,
        "DESTINATIONS": "s3://crashes",
        "SHIPPER_S3_ACCESS_KEY": "access",
        "SHIPPER_S3_SECRET_KEY": _SECRET,
        "SHIPPER_HTTP": "",
    }
    environment = os.environ | {f"CRASHBUS_{name}": value for name, value in settings.items()}
    with log.open("wb") as file:
        command = [sys.executable, "-m", "services.shipper"]
        return subprocess.Popen(command, env=environment, stderr=file)


@pytest.mark.parametrize("own_cores", [False, True])
async def test_service_that_holds_keys_leaves_a_backtrace_and_no_core(
    recorder_with: MakeRecorder, tmp_path: Path, own_cores: bool
) -> None:
    recorder = recorder_with(recorder_own_cores=own_cores)
    await recorder.start()
    shipper = start_shipper(tmp_path / "log")
    await until(lambda: "waiting for the bus" in (tmp_path / "log").read_text())
    limits = Path(f"/proc/{shipper.pid}/limits").read_text()

    shipper.send_signal(signal.SIGSEGV)
    assert await asyncio.to_thread(shipper.wait, 60) == -signal.SIGSEGV

    record = await recorder.captured(shipper.pid)
    files = list((recorder.spool / str(shipper.pid)).iterdir())
    assert any(_SECRET.encode() in file.read_bytes() for file in files) is own_cores
    assert any(file.name.startswith("core_") for file in files) is own_cores
    assert any("OWN_CORES" in note for note in record.notes) is not own_cores
    assert "--- backtrace\n#0 0x" in recorder.file(shipper.pid, "backtrace").read_text()
    # Nor does it where somebody else has core_pattern.
    assert re.search(r"Max core file size +0 +0 ", limits)


@pytest.mark.parametrize("own_cores", [False, True])
async def test_service_that_holds_keys_leaves_no_core_while_there_is_no_recorder(
    recorder_with: MakeRecorder, tmp_path: Path, own_cores: bool
) -> None:
    recorder = recorder_with(recorder_mechanism="pipe", recorder_own_cores=own_cores)
    await recorder.start()
    recorder.kill()
    await until(lambda: "the pipe helper keeps crashes" in recorder.log)
    shipper = start_shipper(tmp_path / "log")
    await until(lambda: "waiting for the bus" in (tmp_path / "log").read_text())

    shipper.send_signal(signal.SIGSEGV)
    assert await asyncio.to_thread(shipper.wait, 60) == -signal.SIGSEGV

    (orphan,) = (recorder.spool / layout.ORPHANS).glob(f"*-{shipper.pid}")
    assert (_SECRET.encode() in (orphan / "core").read_bytes()) is own_cores
    await recorder.start()
    await recorder.captured(shipper.pid)
    kept = list((recorder.spool / str(shipper.pid)).glob("core_*"))
    assert bool(kept) is own_cores


_LIKE_OURS = ("-c", "import ctypes; ctypes.string_at(0)", "crashbus", "-m", "services.shipper")


async def test_program_of_a_user_leaves_its_core_whatever_its_arguments(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await recorder.start()

    pid, _ = await asyncio.to_thread(crash, sys.executable, *_LIKE_OURS)

    record = await recorder.captured(pid)
    assert record.process.command_line[-1] == "services.shipper"
    assert recorder.file(pid, "core").stat().st_size > 0


async def test_program_of_a_user_leaves_its_core_while_there_is_no_recorder(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with(recorder_mechanism="pipe")
    await recorder.start()
    recorder.kill()
    await until(lambda: "the pipe helper keeps crashes" in recorder.log)

    pid, _ = await asyncio.to_thread(crash, sys.executable, *_LIKE_OURS)

    (orphan,) = (recorder.spool / layout.ORPHANS).glob(f"*-{pid}")
    assert (orphan / "end").read_text() == ""
