"""What the pipe helper keeps of crashes that no recorder takes, and what becomes of it."""

import asyncio
import errno
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from crashbus import Bus, DeadLetter, layout, own_cores
from crashbus.identity import crash_id
from services.recorder.errors import CaptureFailed
from services.recorder.kept import orphan as orphan_module
from services.recorder.kept import orphan_rules
from services.recorder.kept.orphan import Orphan, Unreadable
from services.recorder.kept.orphans import Orphans
from services.recorder.settings import RecorderSettings
from tests.recorder.conftest import MakeRecorder
from tests.recorder.test_capture import frames, gdb
from tests.support import core_pattern
from tests.support.crashers import crasher
from tests.support.disk import small_disk
from tests.support.nats import NatsServer, free_port
from tests.support.recorder import FILES, RecorderService, crash
from tests.support.requirements import need_root
from tests.support.victim import Victim
from tests.support.wait import until

WITHIN = 9  # seconds
_SECRET = "correct horse battery"
_WITH_SECRET = f"""
import ctypes
kept = "".join(reversed({_SECRET[::-1]!r}))
ctypes.string_at(0)
"""


def orphans(recorder: RecorderService) -> list[Path]:
    place = recorder.spool / layout.ORPHANS
    return list(place.iterdir()) if place.exists() else []


async def killed(recorder: RecorderService) -> RecorderService:
    """Start a recorder and kill it; crashes go to its helper."""
    await recorder.start()
    recorder.kill()
    await until(lambda: "the pipe helper keeps crashes" in recorder.log, WITHIN)
    return recorder


@pytest.mark.parametrize("mechanism", ["socket", "pipe"])
async def test_crash_without_a_recorder_is_captured_by_the_next_one(
    recorder_with: MakeRecorder, tmp_path: Path, mechanism: str
) -> None:
    recorder = await killed(recorder_with(recorder_mechanism=mechanism))
    program = crasher("null_pointer")
    victim = Victim(program, "an argument", cwd=tmp_path, env={"API_KEY": "hunter2", "LANG": "C"})

    assert await asyncio.to_thread(victim.go().process.wait, WITHIN) == -signal.SIGSEGV

    assert not recorder.record(victim.pid)
    await recorder.start()
    record = await recorder.captured(victim.pid, WITHIN)
    assert (record.signal_name, record.fault_address) == ("SIGSEGV", 0)
    boot = record.process.boot_id
    assert record.crash_id == crash_id(boot, victim.pid, victim.start_ticks)
    assert record.process.executable == str(program)
    assert record.process.command_line[1:] == ("an argument",)
    assert len(record.files) == len(FILES)
    assert not any(file.truncated for file in record.files.values())
    assert any("pipe helper kept it" in note for note in record.notes)
    core = recorder.file(victim.pid, "core")
    assert (core.stat().st_uid, core.stat().st_mode & 0o777) == (0, 0o600)
    assert "crash_here" in gdb(program, core, "bt")
    assert frames(recorder.file(victim.pid, "backtrace").read_text())[0][2] == "crash_here"
    snapshot = json.loads(recorder.file(victim.pid, "snapshot").read_bytes())
    assert (snapshot["Pid"], snapshot["Cwd"]) == (victim.pid, str(tmp_path))
    assert "API_KEY=<redacted>" in snapshot["Environment"]
    assert snapshot["Threads"][0]["Name"] == "null_pointer"
    assert "--- registers" in recorder.file(victim.pid, "backtrace").read_text()
    await until(lambda: not orphans(recorder), WITHIN)


async def test_crash_while_the_next_recorder_takes_core_pattern_back_is_kept_at_once(
    recorder_with: MakeRecorder,
) -> None:
    """It listens already, on a socket that is the kernel's alone: a helper there is no crash."""
    recorder = await killed(recorder_with(recorder_mechanism="socket"))
    stand_in = core_pattern.current()
    await recorder.start()
    core_pattern.set_pattern(stand_in)

    pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"), within=WITHIN)

    record = await recorder.captured(pid)
    assert any("pipe helper kept it" in note for note in record.notes)
    assert "handshake_failed" not in recorder.log


async def test_crashes_that_wait_for_their_turn_outlive_a_recorder_that_is_killed(
    recorder_with: MakeRecorder,
) -> None:
    """In a storm most of them wait; only what is in hand is the recorder's to lose."""
    port = free_port()
    recorder = recorder_with(
        recorder_mechanism="pipe", recorder_captures=1, recorder_http=f"127.0.0.1:{port}"
    )
    await recorder.start()
    # Each has the one capture thread wait for what never comes.
    idle = [connected(recorder) for _ in range(20)]
    victims = [Victim(crasher("null_pointer")).go() for _ in range(3)]
    await until(lambda: waiting(port) - sum(map(is_waiting, idle)) >= len(victims))

    recorder.kill_with_watchdogs()

    for one in idle:
        one.close()
    for victim in victims:
        assert await asyncio.to_thread(victim.process.wait, 60) == -signal.SIGSEGV
    await recorder.start()
    for victim in victims:
        record = await recorder.captured(victim.pid)
        assert any("pipe helper kept it" in note for note in record.notes)
        assert not any(file.truncated for file in record.files.values())


def connected(recorder: RecorderService) -> socket.socket:
    """Return a connection as a pipe helper makes it; the recorder has greeted."""
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(recorder.socket))
    assert made.recv(1) == b"."
    return made


def is_waiting(helper: socket.socket) -> bool:
    """Tell whether it was not yet this helper's turn."""
    return not select.select([helper], [], [], 0)[0]


def waiting(port: int) -> float:
    """Return how many crashes a recorder says are waiting."""
    with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        found = re.search(
            r'^crashbus_recorder_held\{stage="waiting"\} (\S+)$', answer.read().decode(), re.M
        )
        return float(found[1]) if found else 0
    return 0


@pytest.mark.parametrize(
    "setting", [{"core_off": "executable=/usr/bin/python3*"}, {"core": "stacks"}]
)
async def test_memory_that_nobody_may_keep_is_not_kept(
    recorder_with: MakeRecorder, setting: dict[str, str]
) -> None:
    settings = {f"recorder_{name}": value for name, value in setting.items()}
    recorder = await killed(recorder_with(recorder_mechanism="pipe", **settings))

    pid, _ = crash("/usr/bin/python3", "-c", _WITH_SECRET, within=WITHIN)

    (orphan,) = await until(lambda: orphans(recorder))
    assert 0 < (orphan / "core").stat().st_size < 256 * 1024
    assert _SECRET.encode() not in (orphan / "core").read_bytes()
    await recorder.start()
    record = await recorder.captured(pid, WITHIN)
    assert not any(name.startswith("core_") for name in record.files)
    assert "--- registers" in recorder.file(pid, "backtrace").read_text()


async def test_core_that_is_cut_is_flagged(recorder_with: MakeRecorder) -> None:
    recorder = await killed(
        recorder_with(recorder_mechanism="pipe", recorder_max_core_bytes=300_000)
    )

    pid, _ = crash("/usr/bin/python3", "-c", _WITH_SECRET, within=WITHIN)

    await recorder.start()
    record = await recorder.captured(pid, WITHIN)
    core = record.files[recorder.file(pid, "core").name]
    assert (core.size, core.truncated) == (300_000, True)
    assert re.search(r"\d+ of \d+ bytes are missing: kept by the pipe helper", core.note or "")


async def test_what_cannot_be_read_is_told_and_put_aside(
    recorder_with: MakeRecorder, nats_server: NatsServer, bus: Bus
) -> None:
    recorder = await killed(recorder_with(recorder_mechanism="pipe", nats_url=nats_server.url))
    broken = recorder.spool / layout.ORPHANS / "1795396543-4194000"
    broken.mkdir(mode=0o700)
    (broken / "crash").write_bytes(b"4194000 4194000 11 1795396543\n")

    await recorder.start()

    letters = await until(lambda: bus.stored(DeadLetter), WITHIN)
    assert letters[0].reason == "capture_failed"
    assert "cannot be read" in letters[0].error
    # Others may crash at the same time.
    aside = broken.with_name(f"unreadable-{broken.name}")
    await until(lambda: aside in orphans(recorder) and broken not in orphans(recorder))


async def test_directory_that_is_not_root_s_alone_is_put_aside(
    recorder_with: MakeRecorder,
) -> None:
    need_root()
    recorder = recorder_with(recorder_mechanism="pipe")
    planted = recorder.spool / layout.ORPHANS / "1795396543-1"
    planted.mkdir(parents=True)
    os.chown(planted.parent, 65534, 65534)

    await recorder.start()

    assert not orphans(recorder)
    assert (recorder.spool / layout.ORPHANS).stat().st_mode & 0o777 == 0o700


class Helper:
    """The helper, as the kernel starts it, with a place and rules of its own."""

    def __init__(self, place: Path, **settings: object) -> None:
        need_root()
        self.orphans = place / layout.ORPHANS
        self.orphans.mkdir(mode=0o700)
        self._program = Path(shutil.copy("build/corepipe", place))
        self._rules = place / orphan_rules.NAME
        chosen = RecorderSettings.model_validate(settings)
        self._rules.write_text(orphan_rules.text(place, chosen))

    def rule(self, line: str) -> None:
        self._rules.write_text(self._rules.read_text() + line + "\n")

    def start(self, pid: int, core: int, at: int = 1795396543) -> subprocess.Popen[bytes]:
        arguments = ["/nowhere", str(pid), str(pid), "11", str(at)]
        return subprocess.Popen([self._program, *arguments], stdin=core)


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen(["/bin/sleep", "600"])
    # It has its name a moment after it has begun, for which nobody can wait: execve(2).
    while Path(f"/proc/{process.pid}/comm").read_bytes() != b"sleep\n":
        os.sched_yield()
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def endless() -> Iterator[tuple[int, int]]:
    """A pipe that somebody has open for writing."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def kept(tmp_path: Path, sleeper: int) -> Path:
    """What the helper keeps of a process."""
    helper = Helper(tmp_path)
    assert helper.start(sleeper, subprocess.DEVNULL).wait(60) == 0
    (orphan,) = helper.orphans.iterdir()
    return orphan


@contextmanager
def looking(
    spool: Path, adopt: Callable[[Orphan], None], failed: Callable[[CaptureFailed], None]
) -> Iterator[None]:
    looker = Orphans(spool, adopt, failed, lambda *_: False)
    looker.start()
    yield
    looker.stop(60)


def _not_wanted(what: object) -> None:
    pytest.fail(f"not expected: {what}")


async def test_one_that_cannot_be_had_now_keeps_none_behind_it_waiting(kept: Path) -> None:
    later = shutil.copytree(kept, kept.with_name("1795396544-1"), symlinks=True)
    seen = []

    def adopt(orphan: Orphan) -> None:
        orphan.close()
        seen.append(orphan)
        if len(seen) == 1:
            raise OSError(errno.ENOSPC, "no room")

    with looking(kept.parent.parent, adopt, _not_wanted):
        await until(lambda: not later.exists())
        assert kept.exists()


async def test_one_that_stands_still_keeps_none_behind_it_waiting(kept: Path) -> None:
    """What it mapped lies on a disk that does not answer, say."""
    later = kept.with_name("1795396544-1")
    shutil.copytree(kept, later, symlinks=True)
    begun: list[Orphan] = []
    released = threading.Event()

    def adopt(orphan: Orphan) -> None:
        orphan.close()
        begun.append(orphan)
        if len(begun) == 1:
            released.wait(60)

    stuck = Orphans(kept.parent.parent, adopt, _not_wanted, lambda *_: True)
    stuck.start()
    try:
        await until(lambda: begun)
        stuck.replace_stuck()
        await until(lambda: not later.exists())
        assert (kept / "tried").exists()
        began = time.monotonic()
        stuck.stop(20)
        assert time.monotonic() - began < 10
    finally:
        released.set()
        stuck.stop(60)


async def test_one_that_was_tried_before_comes_after_all_others(kept: Path) -> None:
    later = kept.with_name("1795396544-1")
    shutil.copytree(kept, later, symlinks=True)
    (kept / "tried").touch()
    order = []

    def adopt(orphan: Orphan) -> None:
        order.append(Path(f"/proc/self/fd/{orphan.directory}").readlink())
        orphan.close()

    with looking(kept.parent.parent, adopt, _not_wanted):
        await until(lambda: not kept.exists() and not later.exists())

    assert order == [later, kept]


async def test_those_that_cannot_be_read_are_told_once_each_though_they_have_one_name(
    kept: Path,
) -> None:
    told: list[CaptureFailed] = []
    (kept / "status").unlink()
    aside = kept.with_name(f"unreadable-{kept.name}")
    shutil.copytree(kept, aside, symlinks=True)
    behind = kept.with_name("1795396544-1")
    behind.mkdir(mode=0o700)
    (behind / "crash").touch()

    with looking(kept.parent.parent, _not_wanted, told.append):
        await until(lambda: len(told) > 1 and not behind.exists())

    assert not kept.exists() and aside.exists() and len(told) == 2


# None of the links, which lead to what is not ours.
FILES_OF_A_CRASH = ("crash", "boot_id", "stat", "status", "cgroup", "maps", "tasks", "limits")


@given(data=st.data())
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_damaged_is_read_or_unreadable_and_nothing_stays_open(
    kept: Path, data: st.DataObject
) -> None:
    part = data.draw(st.sampled_from(FILES_OF_A_CRASH))
    whole = (kept / part).read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    damage = data.draw(st.sampled_from([b"\0" * 4096, b"\n", b"-"]) | st.binary(max_size=64))
    before = set(Path("/proc/self/fd").iterdir())
    directory = os.open(kept, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (kept / part).write_bytes(whole[:at] + damage + whole[at + len(damage) :])
        with suppress(Unreadable):
            orphan_module.read(directory).close()
    finally:
        (kept / part).write_bytes(whole)
        os.close(directory)

    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 4096,
        b"zz-1 r-xp 0 00:00 12 /z",
        b"1-2 r-xp 0 fe 3 /z",
        b"1-2 r-xp 0 fe:00 3 \t/z",
    ],
)
def test_damaged_mapping_costs_no_other(kept: Path, line: bytes) -> None:
    maps = (kept / "maps").read_bytes()
    begin, end = maps.splitlines(keepends=True)[0], b"1-2 r-xp 0 fffffffff:0 3 /bin/true\n"
    (kept / "maps").write_bytes(maps.replace(begin, begin + line + b"\n") + end)
    directory = os.open(kept, os.O_RDONLY | os.O_DIRECTORY)
    try:
        orphan = orphan_module.read(directory)
        orphan.close()
    finally:
        os.close(directory)

    assert "libc.so" in " ".join(one.path for one in orphan.facts.modules if one.file >= 0)


def test_helper_does_not_wait_for_ever_for_a_core(
    tmp_path: Path, sleeper: int, endless: tuple[int, int]
) -> None:
    # Enough for what there is, on a busy machine too.
    helper = Helper(tmp_path, hold_deadline=5)
    os.write(endless[1], b"\x7fELF" * 1000)

    assert helper.start(sleeper, endless[0]).wait(WITHIN) == 0

    (orphan,) = helper.orphans.iterdir()
    assert (orphan / "core").read_bytes() == b"\x7fELF" * 1000
    assert (orphan / "end").read_text() == "it took too long"


def test_disk_that_does_not_answer_does_not_hold_the_process(tmp_path: Path, sleeper: int) -> None:
    with small_disk(tmp_path / "disk", 32) as disk:
        helper = Helper(disk.place, hold_deadline=1)
        with disk.hanging():
            # It cannot end: its thread waits for the disk. But it holds nothing any more.
            reading, writing = os.pipe()
            stuck = helper.start(sleeper, reading)
            os.close(reading)
            with os.fdopen(writing, "wb"):
                held = select.poll()
                held.register(writing, 0)  # POLLERR comes unasked: nobody can read any more
                assert held.poll(WITHIN * 1000) == [(writing, select.POLLERR)]
        stuck.wait(WITHIN)


def test_only_so_many_are_kept(tmp_path: Path, sleeper: int) -> None:
    helper = Helper(tmp_path)
    for number in range(orphan_rules.MOST):
        (helper.orphans / str(number)).mkdir()

    assert helper.start(sleeper, subprocess.DEVNULL).wait(WITHIN) == 1

    assert len(list(helper.orphans.iterdir())) == orphan_rules.MOST


async def test_those_that_come_at_once_count_each_other(tmp_path: Path, sleeper: int) -> None:
    helper = Helper(tmp_path)
    for number in range(orphan_rules.MOST - 1):
        (helper.orphans / str(number)).mkdir()
    locked = os.open(helper.orphans, os.O_RDONLY)
    try:
        fcntl.flock(locked, fcntl.LOCK_EX)  # as another that has seen room
        running = helper.start(sleeper, subprocess.DEVNULL)
        await until(lambda: helper.orphans in _open_files(running.pid), WITHIN, 0.005)
        (helper.orphans / "1000").mkdir()
    finally:
        os.close(locked)

    assert running.wait(WITHIN) == 1


def test_lock_on_all_that_nobody_gives_back_loses_no_crash(tmp_path: Path, sleeper: int) -> None:
    helper = Helper(tmp_path)
    locked = os.open(helper.orphans, os.O_RDONLY)
    try:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert helper.start(sleeper, subprocess.DEVNULL).wait(WITHIN) == 0
    finally:
        os.close(locked)


def _open_files(pid: int) -> list[Path]:
    return [one.readlink() for one in Path(f"/proc/{pid}/fd").iterdir()]


def test_what_was_put_aside_takes_no_place(tmp_path: Path, sleeper: int) -> None:
    helper = Helper(tmp_path)
    for number in range(orphan_rules.MOST):
        (helper.orphans / f"unreadable-{number}-1").mkdir()

    assert helper.start(sleeper, subprocess.DEVNULL).wait(WITHIN) == 0


def test_one_user_takes_three_quarters_of_the_places(tmp_path: Path, sleeper: int) -> None:
    helper = Helper(tmp_path)
    with subprocess.Popen(["/bin/sleep", "600"], user=65534) as nobody:
        try:
            for number in range(orphan_rules.MOST * 3 // 4 - 1):
                place = helper.orphans / f"{number}-1"
                place.mkdir()
                os.chown(place, 0, 65534)

            assert helper.start(nobody.pid, subprocess.DEVNULL, 1).wait(WITHIN) == 0
            assert helper.start(nobody.pid, subprocess.DEVNULL, 2).wait(WITHIN) == 1
            assert helper.start(sleeper, subprocess.DEVNULL).wait(WITHIN) == 0
        finally:
            nobody.kill()


async def test_newest_of_those_put_aside_are_kept(tmp_path: Path) -> None:
    place = tmp_path / layout.ORPHANS
    place.mkdir(mode=0o700)
    for number in range(8, 20):
        (place / f"unreadable-{number}-1" / "core").mkdir(parents=True)

    with looking(tmp_path, _not_wanted, _not_wanted):
        await until(lambda: len(list(place.iterdir())) <= 8)

    assert {one.name for one in place.iterdir()} == {f"unreadable-{n}-1" for n in range(12, 20)}


def test_core_stops_at_the_reserve_though_it_was_not_near_when_it_began(
    tmp_path: Path, sleeper: int
) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        helper = Helper(disk.place, disk_reserve=30)
        reading, writing = os.pipe()
        running = helper.start(sleeper, reading)
        os.close(reading)
        with os.fdopen(writing, "wb", buffering=0) as core:
            core.write(b"x" * (4 << 20))  # more than is read before the first is written
            disk.fill(leaving=12 << 20)  # others did
            with suppress(BrokenPipeError):
                core.write(b"x" * (16 << 20))

        assert running.wait(WITHIN) == 0
        (orphan,) = helper.orphans.iterdir()
        assert "its reserve" in (orphan / "end").read_text()
        assert (orphan / "core").stat().st_size < 8 << 20


def test_directory_that_others_can_enter_gets_nothing(tmp_path: Path, sleeper: int) -> None:
    helper = Helper(tmp_path)
    helper.orphans.chmod(0o755)

    assert helper.start(sleeper, subprocess.DEVNULL).wait(WITHIN) == 1

    assert not list(helper.orphans.iterdir())


@pytest.mark.parametrize(
    ("rule", "keeps"),
    [
        ("off executable /usr/bin/vault*", True),
        ("off executable */sleep", False),
        ("off executable /bin/sleep", True),
        ("off argument 60", True),
        ("off argument 6?0", False),
        ("off argument */sleep", False),
        ("off comm slee", True),
        ("off comm sleep", False),
        ("off user 65534", True),
        ("off user 0", False),
        ("off container abc", True),
        ("off colour red", False),
        ("of executable /usr/bin/vault*", False),
        ("nonsense", False),
    ],
)
def test_rule(tmp_path: Path, sleeper: int, rule: str, keeps: bool) -> None:
    helper = Helper(tmp_path)
    helper.rule(rule)
    core = tmp_path / "core"
    core.write_bytes(b"no core at all")

    with core.open("rb") as file:
        assert helper.start(sleeper, file.fileno()).wait(WITHIN) == 0

    (orphan,) = helper.orphans.iterdir()
    assert (orphan / "core").read_bytes() == (core.read_bytes() if keeps else b"")


def test_rule_for_an_argument_holds_where_not_all_were_read(tmp_path: Path) -> None:
    helper = Helper(tmp_path)
    helper.rule("off argument --token")
    core = tmp_path / "core"
    core.write_bytes(b"no core at all")
    many = ["x" * 100_000] * 3
    sleep = "import time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", sleep, *many]) as running, core.open("rb") as file:
        try:
            assert helper.start(running.pid, file.fileno()).wait(WITHIN) == 0
        finally:
            running.kill()

    (orphan,) = helper.orphans.iterdir()
    assert not (orphan / "core").read_bytes()


def test_rule_names_a_program_whose_file_was_replaced(tmp_path: Path) -> None:
    helper = Helper(tmp_path)
    helper.rule("off executable */vault")
    program = Path(shutil.copy("/bin/sleep", tmp_path / "vault"))
    core = tmp_path / "core"
    core.write_bytes(b"no core at all")
    with subprocess.Popen([program, "600"]) as running, core.open("rb") as file:
        program.unlink()
        try:
            assert helper.start(running.pid, file.fileno()).wait(WITHIN) == 0
        finally:
            running.kill()

    (orphan,) = helper.orphans.iterdir()
    assert (orphan / "exe").readlink().name == "vault (deleted)"
    assert (orphan / "core").read_bytes() == b""


# ELF header of a core and one PT_LOAD, whose memory begins at 4096; elf(5).
_HEAD = struct.pack(
    "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0
) + struct.pack("<IIQQQQQQ", 1, 4, 4096, 0, 0, 6000, 6000, 4096)


@pytest.mark.parametrize("at", [None, 0, 16, 32, 40, 54, 56, 64, 72])
def test_head_that_lies_gives_no_memory_away(tmp_path: Path, sleeper: int, at: int | None) -> None:
    """With any field of it as large as can be, all that is kept is headers and notes."""
    helper = Helper(tmp_path)
    helper.rule("off everyone")
    raw = bytearray(_HEAD.ljust(4096, b"\0") + b"memory" * 1000)
    if at is not None:
        raw[at : at + 8] = b"\xff" * 8
    core = tmp_path / "core"
    core.write_bytes(raw)

    with core.open("rb") as file:
        assert helper.start(sleeper, file.fileno()).wait(WITHIN) == 0

    (orphan,) = helper.orphans.iterdir()
    kept = (orphan / "core").read_bytes()
    assert b"memory" not in kept
    assert at is not None or kept == bytes(raw[:4096])


def test_rules_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RecorderSettings.model_validate(
        {
            "core_off": "executable=/usr/bin/vault*, user=root, user=7, container=ab, label=x",
            "max_core_bytes": 5,
            "disk_reserve": 2.5,
        }
    )

    lines = orphan_rules.text(Path("/spool"), settings).splitlines()

    assert lines == [
        *("directory /spool/.orphans", "limit 5", "reserve 25", "most 64", "seconds 60"),
        *("off executable /usr/bin/vault*", "off user 0", "off user 7", "off container ab"),
        "off containers",
        *(f"off comm {name}" for name in own_cores.NAMES),
    ]
