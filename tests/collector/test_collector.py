"""The collector as a process: real files by a real crashing process, a real bus."""

import asyncio
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from nats.js.errors import NotFoundError

from crashbus import DeadLetter, Manifest, crash_id, identity, layout, streams
from crashbus.errors import BusUnreachable
from services.common.unrecorded import Unrecorded
from tests.collector.conftest import FILE, TCP, Setup, fill_chunk_store
from tests.collector.stand_in import signal_event
from tests.support.crashers import crasher
from tests.support.nats import NatsServer
from tests.support.wait import until


@pytest.fixture(autouse=True)
async def shipper(setup: Setup) -> object:
    task = setup.shipper.start()
    yield task
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def crash(setup: Setup, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([crasher("appscope_like"), setup.spool, *options])


async def reports(setup: Setup, count: int = 1) -> list[Manifest]:
    async def enough() -> list[Manifest] | None:
        try:
            found = await setup.bus.stored(Manifest)
        except BusUnreachable:
            return None
        return found if len(found) >= count else None

    return await until(enough, within=60)


def epoch_of(setup: Setup, pid: int) -> int:
    return int(next((setup.spool / str(pid)).glob("core_*")).name.split("_")[1])


async def test_appscope_set_is_delivered_whole_and_once_for_each_destination(
    setup: Setup,
) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    start = identity.start_ticks(process.pid)
    (manifest,) = await reports(setup)
    epoch = epoch_of(setup, process.pid)
    core = f"core_{epoch}"
    small = {f"{kind}_{epoch}" for kind in ("info", "backtrace", "cfg")}
    await setup.shipper.has(FILE, *small, core, "manifest.json")

    assert manifest.crash_id == crash_id(identity.boot_id(), process.pid, start)
    assert manifest.signal_name == "SIGSEGV"
    assert manifest.fault_address == 0x10
    assert {file.name for file in manifest.files} == {*small, core}
    assert not any(file.truncated for file in manifest.files)
    for name in (*small, core):
        source = (setup.spool / str(process.pid) / name).read_bytes()
        assert setup.shipper.content(FILE, name) == source
        listed = next(file for file in manifest.files if file.name == name)
        assert listed.sha256 == hashlib.sha256(source).hexdigest()
    # AppScope's daemon sends small files in name order, and no core.
    assert [name for place, name in setup.shipper.order if place == TCP] == sorted(small)
    # Small files go first, the manifest when all others are there.
    order = [name for place, name in setup.shipper.order if place == FILE]
    assert order[0].startswith("info") and order[-2:] == [core, "manifest.json"]
    written = Manifest.model_validate_json(setup.shipper.content(FILE, "manifest.json"))
    assert written.files == manifest.files
    # Chunks leave the bus on the same evidence.
    jetstream = setup.bus._js

    async def no_chunks() -> bool:
        return (await jetstream.stream_info(streams.CHUNKS)).state.messages == 0

    await until(no_chunks)
    process.wait()


async def test_recovering_process_yields_one_crash_with_several_sets(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup, "recover")
    try:
        manifests = await reports(setup, 3)
        assert len({manifest.crash_id for manifest in manifests}) == 1
        assert [manifest.revision for manifest in manifests] == [1, 2, 3]
        assert len(manifests[-1].files) == 12
        names = [file.name for file in manifests[-1].files]
        await setup.shipper.has(FILE, *names)
    finally:
        process.kill()
        process.wait()


async def test_crash_before_the_collector_started_is_found_at_start(setup: Setup) -> None:
    process = crash(setup)
    process.wait()
    await setup.collector.start()
    (manifest,) = await reports(setup)
    assert len(manifest.files) == 4
    assert "its start is not known" in manifest.notes[0]
    await setup.shipper.has(FILE, "manifest.json")


async def test_event_names_the_process_when_it_was_gone_before_anyone_looked(
    setup: Setup,
) -> None:
    process = crash(setup)
    event = signal_event(process.pid, disposition="handled")
    await setup.bus.publish(event)
    process.wait()
    await setup.collector.start()
    (manifest,) = await reports(setup)
    assert manifest.crash_id == event.crash_id
    assert manifest.process == event.process


async def deaths_in_hand(setup: Setup, count: int) -> bool:
    """Tell whether the collector follows just so many signal events."""
    with suppress(NotFoundError):  # its consumer is made soon
        info = await setup.bus._js.consumer_info(streams.SIGNALS, "collector-signals-test-host")
        return info.num_ack_pending == count
    return False


async def test_death_without_crash_files_is_told(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    await until(lambda: deaths_in_hand(setup, 0))
    victim = subprocess.Popen(["sleep", "60"])
    event = signal_event(victim.pid)
    await setup.bus.publish(event)
    # It is alive, so nothing is told yet; its end is what decides.
    await until(lambda: deaths_in_hand(setup, 1))
    assert await setup.bus.stored(DeadLetter) == []
    victim.kill()
    victim.wait()
    (manifest,) = await reports(setup)
    (letter,) = await setup.bus.stored(DeadLetter)
    assert letter.reason == "not_captured" and letter.crash_id == event.crash_id
    refuses = Path("/proc/sys/fs/suid_dumpable").read_text().strip() == "0"
    assert ("sysctl fs.suid_dumpable=2" in letter.mend) is refuses
    assert manifest.files == () and "nothing captured it" in manifest.notes[0]


async def test_crash_that_was_read_and_has_no_record_yet_is_waited_for(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    await until(lambda: deaths_in_hand(setup, 0))
    read, lost = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])
    unrecorded = Unrecorded(setup.spool)
    assert unrecorded.begin(read.pid)
    events = [signal_event(process.pid) for process in (read, lost)]
    for event in events:
        await setup.bus.publish(event)
    await until(lambda: deaths_in_hand(setup, 2))
    for process in (read, lost):
        process.kill()
        process.wait()
    # The one that died later is told, so this one would have been.
    await until(lambda: deaths_in_hand(setup, 1))
    letters = await setup.bus.stored(DeadLetter)
    assert [one.crash_id for one in letters] == [events[1].crash_id]

    unrecorded.end(read.pid)

    await reports(setup, 2)
    letters = await setup.bus.stored(DeadLetter)
    assert [one.crash_id for one in letters] == [events[1].crash_id, events[0].crash_id]
    assert {one.reason for one in letters} == {"not_captured"}


async def test_crash_that_the_pipe_helper_keeps_is_not_told_as_missing(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    kept, lost = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])
    events = [signal_event(process.pid) for process in (kept, lost)]
    place = setup.spool / layout.ORPHANS / f"{int(events[0].time)}-{kept.pid}"
    place.mkdir(parents=True)

    for process, event in zip((kept, lost), events, strict=True):
        process.kill()
        process.wait()
        await setup.bus.publish(event)
    await until(lambda: setup.bus.stored(DeadLetter), 30)
    await until(lambda: deaths_in_hand(setup, 0), 30)

    assert [one.crash_id for one in await setup.bus.stored(DeadLetter)] == [events[1].crash_id]


@pytest.mark.parametrize("moment", ["info", "core"])
async def test_collector_killed_while_gathering_goes_on_after_restart(
    setup: Setup, moment: str
) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    directory = setup.spool / str(process.pid)
    await until(lambda: list(directory.glob(f"{moment}_*")))
    setup.collector.kill()
    await setup.collector.wait()
    process.wait()
    await setup.collector.start()
    manifest = (await reports(setup))[-1]
    await setup.shipper.has(FILE, *(file.name for file in manifest.files), "manifest.json")
    assert len(manifest.files) == 4


async def test_bus_that_lost_its_store_gets_everything_again(setup: Setup) -> None:
    """Work items and chunks vanish before any shipper took them; only time is lost."""
    await setup.collector.start()
    await setup.collector.healthy()
    jetstream = setup.bus._js
    for stream in (streams.FILES, streams.CHUNKS, streams.SMALL_CHUNKS):
        await jetstream.delete_stream(stream)
    process = crash(setup)
    process.wait()
    # The collector makes the streams anew.
    (manifest,) = await reports(setup)
    await setup.shipper.has(FILE, *(file.name for file in manifest.files), "manifest.json")


async def test_nats_killed_and_restarted_loses_nothing(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    setup.nats.kill()
    process = crash(setup)
    process.wait()
    setup.nats.start()
    (manifest,) = await reports(setup)
    await setup.shipper.has(FILE, *(file.name for file in manifest.files), "manifest.json")


async def test_full_bus_holds_the_core_back_and_loses_nothing(setup: Setup) -> None:
    config = await fill_chunk_store(setup)
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    process.wait()
    await until(lambda: setup.collector.metric("crashbus_collector_bus_full_total") > 0)
    # Small files pass: their chunks have room of their own.
    epoch = epoch_of(setup, process.pid)
    await setup.shipper.has(FILE, *(f"{kind}_{epoch}" for kind in ("info", "backtrace", "cfg")))
    assert not any(name.startswith("core") for name in setup.shipper.names(FILE))
    config.max_bytes = 64 * 1024**2
    await setup.bus._js.update_stream(config)
    (manifest,) = await reports(setup)
    await setup.shipper.has(FILE, *(file.name for file in manifest.files), "manifest.json")


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
    (setup.spool / "4194302").symlink_to("/etc")
    (setup.spool / "not-a-pid").mkdir()
    await setup.collector.start()
    await setup.collector.healthy()
    await until(lambda: setup.collector.metric("crashbus_collector_refused_total") >= 6)
    # It still works, and took none of them.
    process = crash(setup)
    process.wait()
    (manifest,) = await reports(setup)
    assert manifest.process.comm == "appscope_like"
    assert secret.read_text() == "root's own"
    assert len(list(directory.iterdir())) == 7


async def test_file_of_another_user_in_a_crash_is_refused(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    directory = setup.spool / str(process.pid)
    info = await until(lambda: next(iter(directory.glob("info_*")), None))
    fake = directory / info.name.replace("info", "snapshot")
    fake.write_text("{}")
    os.chown(fake, 65534, 65534)
    process.wait()
    (manifest,) = await reports(setup)
    assert fake.name not in {file.name for file in manifest.files}
    await until(lambda: "belongs to UID 65534" in setup.collector.log)


async def lose_core(setup: Setup, harm: Callable[[Path], None]) -> tuple[Path, Manifest]:
    """Let a core wait for room on the bus, stop the collector, harm the core, go on."""
    config = await fill_chunk_store(setup)  # the core waits, the rest goes
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    process.wait()
    await until(lambda: "waiting for the bus" in setup.collector.log)
    core = next((setup.spool / str(process.pid)).glob("core_*"))
    setup.collector.kill()  # one that runs holds the file open, so that it cannot lose it
    await setup.collector.wait()
    harm(core)
    config.max_bytes = 64 * 1024**2
    await setup.bus._js.update_stream(config)
    await setup.collector.start()
    return core, (await reports(setup))[0]


def replace_by_link(core: Path) -> None:
    core.unlink()
    core.symlink_to("/etc/passwd")


def replace_by_directory(core: Path) -> None:
    core.unlink()
    core.mkdir()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "source_vanished"),
        (replace_by_link, "source_unreadable"),
        (replace_by_directory, "source_unreadable"),
    ],
)
async def test_lost_source_is_a_dead_letter_and_the_rest_is_delivered(
    setup: Setup, harm: Callable[[Path], None], reason: str
) -> None:
    core, manifest = await lose_core(setup, harm)
    letters = await setup.bus.stored(DeadLetter)
    assert [letter.reason for letter in letters] == [reason]
    assert str(core) in letters[0].error
    assert len(manifest.files) == 3
    await setup.shipper.has(FILE, *(file.name for file in manifest.files))
    assert "manifest.json" not in setup.shipper.names(FILE)


async def test_core_larger_than_the_bus_is_a_dead_letter_and_leaves_no_chunks(
    setup: Setup,
) -> None:
    config = (await setup.bus._js.stream_info(streams.CHUNKS)).config
    config.max_bytes = 100_000
    await setup.bus._js.update_stream(config)
    await setup.collector.start()
    process = crash(setup)
    process.wait()
    (manifest,) = await reports(setup)
    (letter,) = await setup.bus.stored(DeadLetter)
    assert letter.reason == "larger_than_bus"
    assert len(manifest.files) == 3
    await setup.shipper.has(FILE, *(file.name for file in manifest.files))

    async def no_chunks() -> bool:
        return (await setup.bus._js.stream_info(streams.CHUNKS)).state.messages == 0

    await until(no_chunks)


@pytest.mark.parametrize("reason", ["chunks_missing", "damaged_file"])
async def test_chunks_that_a_shipper_misses_are_published_again(
    setup: Setup, shipper: asyncio.Task[None], reason: str
) -> None:
    shipper.cancel()
    await setup.collector.start()
    process = crash(setup)
    process.wait()
    (manifest,) = await reports(setup)
    await setup.bus._js.purge_stream(streams.CHUNKS)
    setup.shipper.reason = reason
    again = setup.shipper.start()
    await setup.shipper.has(FILE, *(file.name for file in manifest.files), "manifest.json")
    again.cancel()


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


@pytest.mark.parametrize("odd", ["forged_crash_id", "long_lived"])
async def test_odd_events_do_not_end_the_following_of_deaths(setup: Setup, odd: str) -> None:
    await setup.collector.start()
    await until(lambda: deaths_in_hand(setup, 0))
    for number in range(600):
        event = signal_event(os.getpid()).model_copy(update={"event_id": f"{odd}-{number}"})
        if odd == "forged_crash_id":
            event = event.model_copy(update={"crash_id": "0" * 16})
        await setup.bus.publish(event)
    victim = subprocess.Popen(["sleep", "60"])
    event = signal_event(victim.pid)
    await setup.bus.publish(event)
    victim.kill()
    victim.wait()

    async def told() -> bool:
        letters = await setup.bus.stored(DeadLetter)
        return [letter.crash_id for letter in letters] == [event.crash_id]

    await until(told, within=60)
    refused = setup.collector.metric("crashbus_collector_refused_total")
    assert refused == (600 if odd == "forged_crash_id" else 0)


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
    for number in range(5_000):
        (directory / f"x{number}").touch()
    process.wait()
    (manifest,) = await reports(setup)
    assert len(manifest.files) == 4


async def test_zombie_is_no_writer(setup: Setup) -> None:
    """Its parent does not reap it; what it left behind is gathered all the same."""
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    await reports(setup)
    status = Path(f"/proc/{process.pid}/stat")
    await until(lambda: ") Z " in status.read_text())
    # A set that lacks its other files: as long as its writer lives, it would be waited for.
    (setup.spool / str(process.pid) / f"info_{int(time.time())}").write_text("Process name: late")
    late = (await reports(setup, 2))[-1]
    assert ") Z " in status.read_text()
    assert any("cut short" in note for note in late.notes)
    process.wait()


async def test_spool_that_is_removed_is_made_again(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    setup.spool.rmdir()
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


async def test_state_that_cannot_be_used_is_said_in_one_line(setup: Setup) -> None:
    setup.collector._environment["CRASHBUS_STATE"] = "/proc/nowhere"
    await setup.collector.start()
    assert await setup.collector.wait(60) == 2
    assert "CRASHBUS_STATE" in setup.collector.log
    assert "Traceback" not in setup.collector.log


async def test_sources_go_only_after_every_receipt(setup: Setup, shipper: object) -> None:
    assert isinstance(shipper, asyncio.Task)
    shipper.cancel()
    setup.collector._environment["CRASHBUS_COLLECTOR_KEEP_DELIVERED"] = "0"
    await setup.collector.start()
    await setup.collector.healthy()
    process = crash(setup)
    process.wait()
    await reports(setup)
    directory = setup.spool / str(process.pid)
    assert len(list(directory.iterdir())) == 4
    again = setup.shipper.start()
    await until(lambda: not directory.exists(), within=60)
    await until(lambda: not setup.ledger())
    assert "manifest.json" in setup.shipper.names(FILE)
    again.cancel()


async def test_sigterm_ends_it_in_order_within_ten_seconds(setup: Setup) -> None:
    await setup.collector.start()
    await setup.collector.healthy()
    setup.collector.kill(signal.SIGTERM)
    assert await setup.collector.wait(60) == 0


async def test_missing_destination_is_said_in_one_line(setup: Setup) -> None:
    setup.collector._environment["CRASHBUS_DESTINATIONS"] = ""
    await setup.collector.start()
    assert await setup.collector.wait(60) == 2
    assert "CRASHBUS_DESTINATIONS" in setup.collector.log
    assert "Traceback" not in setup.collector.log


async def test_server_that_takes_too_small_messages_is_said_in_one_line(
    setup: Setup, tmp_path: Path
) -> None:
    directory = tmp_path / "small"
    directory.mkdir()
    server = NatsServer(directory, "max_payload: 65536\n")
    server.start()
    setup.collector._environment["CRASHBUS_NATS_URL"] = server.url
    try:
        await setup.collector.start()
        assert await setup.collector.wait(60) == 2
    finally:
        server.stop()
    assert "max_payload 65536 is too small" in setup.collector.log
    assert "Traceback" not in setup.collector.log
