"""Who leaves a core, and how much of it."""

import json

import pytest

from crashbus.parts import Container, Process
from services.recorder import core_policy
from services.recorder.core_policy import CorePolicy, Extent, Rule
from tests.recorder.conftest import MakeRecorder
from tests.support.crashers import crasher
from tests.support.recorder import crash


def process(
    executable: str = "/bin/x", uid: int = 0, container: str = "", label: str | None = None
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
