"""What others leave in the spool: refused or cut, and no harm to what is a crash."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from crashbus import Manifest, crash_id, identity
from crashbus.errors import BusUnreachable
from crashbus.layout import Kind
from tests.collector.conftest import FILE, Setup, crash, reports
from tests.collector.stand_in import write_set
from tests.support.records import EPOCH
from tests.support.wait import until

pytestmark = pytest.mark.usefixtures("shipper")


async def test_hostile_entries_are_refused_counted_and_left_alone(
    setup: Setup, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root's own")
    secret.chmod(0o600)
    directory = setup.spool / "4194303"
    directory.mkdir()
    (directory / "core_100").symlink_to(secret)
    os.link(secret, directory / "info_100")
    os.mkfifo(directory / "cfg_100")
    (directory / "backtrace_100").mkdir()
    os.mknod(directory / "snapshot_100", 0o600 | 0o020000, os.makedev(1, 3))
    Path(os.fsdecode(bytes(directory) + b"/core_\xff\xfe")).write_text("not UTF-8")
    (directory / "..core_1").write_text("odd")
    (directory / "core_100\n").write_text("a line of its own")
    (setup.spool / "4194303\n").mkdir()
    (setup.spool / "4194303\n" / "core_100").write_text("odd")
    # From there its address is short.
    with socket.socket(socket.AF_UNIX) as listening, contextlib.chdir(directory):
        listening.bind("core_101")
    (setup.spool / "4194302").symlink_to("/etc")
    (setup.spool / "not-a-pid").mkdir()
    await setup.collector.start()
    await setup.collector.healthy()
    await until(lambda: setup.collector.metric("crashbus_collector_refused_total") >= 7)
    # It still works, and took none of them.
    process = crash(setup)
    process.wait()
    (manifest,) = await reports(setup)
    assert manifest.process.comm == "appscope_like"
    assert secret.read_text() == "root's own"
    assert len(list(directory.iterdir())) == 9


async def test_file_of_another_user_beside_a_crash_is_no_part_of_it(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    directory = setup.spool / str(process.pid)
    info = await until(lambda: next(iter(directory.glob("info_*")), None))
    fake = directory / info.name.replace("info", "snapshot")
    fake.write_text("{}")
    os.chown(fake, 65534, 65534)
    process.wait()
    by_owner = {one.process.uid: one for one in await reports(setup, 2)}
    assert by_owner.keys() == {0, 65534}
    assert fake.name not in {file.name for file in by_owner[0].files}
    assert [file.name for file in by_owner[65534].files] == [fake.name]


async def test_file_that_others_may_write_to_is_delivered_and_flagged(setup: Setup) -> None:
    """It is all there is; but what it says may be another's."""
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    directory = setup.spool / str(process.pid)
    info = await until(lambda: next(iter(directory.glob("info_*")), None))
    info.chmod(0o666)
    process.wait()
    (manifest,) = await reports(setup)
    assert info.name in {file.name for file in manifest.files}
    flag = f"{info.name}: others than its owner may have written to it"
    assert [note for note in manifest.notes if "others" in note] == [flag]


async def test_file_of_another_user_in_a_recorded_set_is_refused(setup: Setup) -> None:
    write_set(setup.spool, 4194303, {Kind.INFO: b"Process name: x"})
    fake = setup.spool / "4194303" / f"snapshot_{EPOCH}"
    fake.write_text("{}")
    os.chown(fake, 65534, 65534)
    await setup.collector.start()
    (manifest,) = await reports(setup)
    assert [file.name for file in manifest.files] == [f"info_{EPOCH}"]
    await until(lambda: "belongs to UID 65534" in setup.collector.log)


async def test_file_in_a_recorded_set_that_others_may_write_to_is_refused(setup: Setup) -> None:
    files = {Kind.INFO: b"Process name: x", Kind.BACKTRACE: b"#0 0x1 f + 1"}
    write_set(setup.spool, 4194303, files)
    (setup.spool / "4194303" / f"info_{EPOCH}").chmod(0o606)
    await setup.collector.start()
    (manifest,) = await reports(setup)
    assert [file.name for file in manifest.files] == [f"backtrace_{EPOCH}"]
    await until(lambda: "others may write to it" in setup.collector.log)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("info_999999999999", "a year beyond 9999"),
        ("core_\u0661\u0662", "digits that are not ASCII"),
        (
            "backtrace_100",
            "backtrace info: signal 11 errno 0 fault address 0x1" + "f" * 30_000 + ", reason:\nx",
        ),
        ("cfg_100", "[" * 5_000),
        ("info_0", "PID: 1\nProcess name: " + "n" * 5_000),
    ],
)
async def test_odd_file_of_any_user_does_not_end_gathering(
    setup: Setup, name: str, text: str
) -> None:
    directory = setup.spool / "4194303"
    directory.mkdir()
    (directory / name).write_text(text)
    for path in (directory, directory / name):
        os.chown(path, 65534, 65534)
    await setup.collector.start()
    process = crash(setup)
    process.wait()

    async def mine() -> Manifest | None:
        with suppress(BusUnreachable):
            for manifest in await setup.bus.stored(Manifest):
                if manifest.process.pid == process.pid:
                    return manifest
        return None

    manifest = await until(mine, within=60)
    await setup.shipper.has(FILE, *(file.name for file in manifest.files), "manifest.json")
    assert setup.collector.metric("crashbus_collector_faults_total") == 0


async def test_name_that_forges_the_start_of_a_living_process_is_another_crash(
    setup: Setup,
) -> None:
    await setup.collector.start()
    victim = subprocess.Popen(["sleep", "60"])
    start = identity.start_ticks(victim.pid)
    directory = setup.spool / str(victim.pid)
    directory.mkdir()
    (directory / f"info_{start}").write_text("Process name: fine")
    for path in (directory, directory / f"info_{start}"):
        os.chown(path, 65534, 65534)
    (manifest,) = await reports(setup)
    assert manifest.crash_id != crash_id(identity.boot_id(), victim.pid, start)
    assert manifest.process.uid == 65534
    victim.kill()
    victim.wait()


async def test_many_foreign_names_hide_no_crash_file(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    directory = setup.spool / str(process.pid)
    await until(directory.exists)
    for number in range(100_000):  # more than inotify(7) queues
        os.mknod(directory / f"x{number}")
    process.wait()
    (manifest,) = await reports(setup)
    assert len(manifest.files) == 4


async def test_spool_that_is_removed_is_made_again(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    shutil.rmtree(setup.spool)
    await until(setup.spool.exists, within=60)
    process = crash(setup)
    process.wait()
    (manifest,) = await reports(setup)
    assert len(manifest.files) == 4


async def test_spool_of_another_user_is_taken_over(setup: Setup) -> None:
    os.chown(setup.spool, 65534, 65534)
    await setup.collector.start()
    await setup.collector.healthy()
    status = setup.spool.stat()
    assert (status.st_uid, status.st_mode & 0o7777) == (0, 0o1777)


async def test_small_file_that_is_huge_is_cut(setup: Setup) -> None:
    await setup.collector.start()
    directory = setup.spool / "4194303"
    directory.mkdir()
    with (directory / "info_100").open("wb") as file:
        file.truncate(1 << 40)
    (manifest,) = await reports(setup)
    (info,) = manifest.files
    assert info.truncated and info.size == 16 * 1024 * 1024


async def test_core_of_a_tebibyte_that_is_a_hole_is_cut_and_takes_no_room(setup: Setup) -> None:
    setup.collector._environment["CRASHBUS_COLLECTOR_MAX_FILE_BYTES"] = str(1 << 30)
    await setup.collector.start()
    directory = setup.spool / "4194303"
    directory.mkdir()
    with (directory / "core_100").open("wb") as file:
        file.write(b"begin")
        file.truncate(1 << 40)
    (manifest,) = await reports(setup)
    (core,) = manifest.files
    assert (core.size, core.truncated, core.expected_size) == (1 << 30, True, 1 << 40)
    assert core.stored_size < 1 << 20


async def test_file_over_the_limit_is_cut_and_flagged(setup: Setup) -> None:
    setup.collector._environment["CRASHBUS_COLLECTOR_MAX_FILE_BYTES"] = "100000"
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    process.wait()
    (manifest,) = await reports(setup)
    (core,) = [file for file in manifest.files if file.truncated]
    assert core.size == 100_000
    assert core.note and "CRASHBUS_COLLECTOR_MAX_FILE_BYTES" in core.note
    await setup.shipper.has(FILE, core.name)
    source = (setup.spool / str(process.pid) / core.name).read_bytes()
    assert setup.shipper.content(FILE, core.name) == source[:100_000]


async def test_as_many_files_may_be_open_as_the_host_allows(setup: Setup) -> None:
    """For each process under AppScope in a container some are; with 1024, sixteen take them all."""
    setup.collector._wrapper = ("prlimit", "--nofile=256:5000")

    await setup.collector.start()
    await setup.collector.healthy()

    limits = Path(f"/proc/{setup.collector.pid}/limits").read_text()
    assert re.search(r"Max open files +5000 +5000 ", limits)
