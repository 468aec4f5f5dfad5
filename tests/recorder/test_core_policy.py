"""Who leaves a core, and how much of it."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crashbus import layout, own_cores
from crashbus.parts import Container, Process
from services.common.process import MAX_READ, container_of
from services.recorder.core import core_policy
from services.recorder.core.core_policy import CorePolicy, Extent, Rule
from services.recorder.settings import RecorderSettings
from tests.recorder.conftest import MakeRecorder
from tests.support.crashers import crasher
from tests.support.recorder import crash
from tests.support.requirements import need_root
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
        ("executable=*/vault", process("/opt/vault (deleted)"), process("/opt/vault (gone)")),
        ("executable=*(deleted)", process("/opt/vault (deleted)"), process("/opt/vault")),
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


@pytest.mark.parametrize(
    ("rule", "fitting", "other"),
    [
        ("argument=*/vault.py", b"py\0/a/vault.py\0", b"py\0/a/vault.pyc\0"),
        ("argument=x", b"x\0", b"xx\0x=x\0"),
        ("argument=Main", b"x\0" * 100_000 + b"Main\0y", b"x\0Main.y"),
        ("argument=--token=x", b"--token=x\0", b"--token=y\0"),
        ("argument=?*", b"\0\0x\0", b"\0\0"),
        ("argument=--token=x", b"x\0" * (MAX_READ // 2), b"x\0" * (MAX_READ // 2 - 1)),
    ],
)
def test_rules_see_each_argument_as_it_is(rule: str, fitting: bytes, other: bytes) -> None:
    policy = CorePolicy(Extent.ALL, (Rule.parse(rule),))

    assert policy.asks_for_arguments
    assert policy.decide(process(), "root", b"", fitting).extent is Extent.NOTHING
    assert policy.decide(process(), "root", b"", other).extent is Extent.ALL


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


def maps(inode: int, device: str = "00:31", path: str = "/bin/x") -> bytes:
    return b"".join(
        f"{start:x}000-{start + 1:x}000 r-xp 00000000 {place}\n".encode()
        for start, place in ((1, "00:00 0"), (2, f"{device} {inode}      {path}"))
    )


def test_loop_of_new_containers_of_an_image_is_one_loop() -> None:
    policy = CorePolicy(Extent.ALL, (), burst=3, one_in=4, clock=Clock())

    def whole(number: int, found: bytes) -> bool:
        one = process(container=f"{number:064x}")
        return policy.decide(one, "root", found).extent is Extent.ALL

    looping = [whole(number, maps(77, f"00:{number:x}")) for number in range(16, 23)]

    assert looping == [True, True, True, False, False, False, True]
    assert whole(100, maps(78))  # another image's
    assert whole(101, b"")
    assert whole(102, maps(77, path="/bin/other"))


def test_crashes_in_one_container_spare_none_of_another_s() -> None:
    policy = CorePolicy(Extent.ALL, (), burst=3, one_in=1000, clock=Clock())
    hostile, other = process(container="a" * 64), process(container="b" * 64)

    for _ in range(1000):
        policy.decide(hostile, "root", maps(77))

    assert policy.decide(hostile, "root", maps(77)).extent is Extent.STACKS
    assert [policy.decide(other, "root", maps(77)).extent for _ in range(3)] == [Extent.ALL] * 3


@pytest.mark.parametrize(
    "made",
    ["{:064x}", "docker-{:064x}.scope", "pod{:08x}-4567-89ab-cdef-0123456789ab/inner"],
)
def test_cgroups_that_a_container_makes_are_no_other_containers(made: str) -> None:
    policy = CorePolicy(Extent.ALL, (), burst=3, one_in=1000, clock=Clock())

    def whole(group: str, found: bytes) -> bool:
        update = {"cgroup": group, "container": container_of(group)}
        one = process().model_copy(update=update)
        return policy.decide(one, "root", found).extent is Extent.ALL

    hostile = [whole(f"/docker/{'a' * 64}/{made.format(n)}", maps(77)) for n in range(10)]

    assert hostile == [True] * 3 + [False] * 7
    assert [whole(f"/docker/{'b' * 64}", maps(77)) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize(
    "pod", ["kubepods/burstable/pod{}/", "kubepods.slice/kubepods-pod{}.slice/cri-containerd-"]
)
def test_containers_of_a_pod_that_start_again_are_one_program(pod: str) -> None:
    policy = CorePolicy(Extent.ALL, (), burst=3, one_in=1000, clock=Clock())
    uid = "0123abcd-4567-89ab-cdef-0123456789ab"

    def whole(number: int, pod_uid: str = uid) -> bool:
        container = f"{number:064x}"
        update = {"cgroup": f"/{pod.format(pod_uid)}{container}"}
        one = process(container=container).model_copy(update=update)
        return policy.decide(one, "root").extent is Extent.ALL

    assert [whole(number) for number in range(5)] == [True] * 3 + [False] * 2
    assert whole(6, uid.replace("0123", "3210"))


def test_containers_of_an_image_show_one_inode(tmp_path: Path) -> None:
    """The kernel's part of it: overlays over the same layer."""
    need_root()
    below = tmp_path / "below"
    below.mkdir()
    shutil.copy(crasher("waiting"), below / "program")
    found = set()
    for name in ("one", "other"):
        places = [tmp_path / name / part for part in ("upper", "work", "merged")]
        for place in places:
            place.mkdir(parents=True)
        options = f"lowerdir={below},upperdir={places[0]},workdir={places[1]}"
        subprocess.run(["mount", "-t", "overlay", "none", "-o", options, places[2]], check=True)
        program = places[2] / "program"
        running = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert running.stdout is not None
            running.stdout.read(1)
            seen = Path(f"/proc/{running.pid}/maps").read_bytes()
            found.add(core_policy._executable_file(process(str(program)), seen))
        finally:
            running.kill()
            running.communicate()
            subprocess.run(["umount", places[2]], check=True)
    assert found == {str((below / "program").stat().st_ino)}


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
    recorder = recorder_with(
        recorder_core_off="user=nobody, executable=*/threads, argument=--token=65th"
    )
    await recorder.start()

    pid, _ = crash(crasher("threads"), env={"KEPT": "a-secret-of-mine"})
    record = await recorder.captured(pid)
    other, _ = crash(crasher("null_pointer"), "--token=x")
    many, _ = crash(crasher("null_pointer"), *["x"] * 64, "--token=65th")

    assert not list((recorder.spool / str(pid)).glob("*core*"))
    record_of_many = await recorder.captured(many)
    assert "no core for argument=--token=65th" in record_of_many.notes[0]
    assert not list((recorder.spool / str(many)).glob("*core*"))
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
