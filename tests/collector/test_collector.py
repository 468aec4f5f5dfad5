"""The collector as a process: real files by a real crashing process, a real bus."""

import asyncio
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crashbus import DeadLetter, Manifest, crash_id, identity, streams
from tests.collector.conftest import FILE, TCP, Setup, crash, epoch_of, fill_chunk_store, reports
from tests.collector.stand_in import signal_event
from tests.support.nats import NatsServer
from tests.support.wait import until

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"

pytestmark = pytest.mark.usefixtures("shipper")


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
    # Small files go first, in order; the manifest when all others are there.
    order = [name for place, name in setup.shipper.order if place == FILE]
    in_order = [f"{kind}_{epoch}" for kind in ("info", "backtrace", "cfg", "core")]
    assert order == [*in_order, "manifest.json"]
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

    async def manifest() -> Manifest | None:
        found = await setup.bus.stored(Manifest)  # of another's file in its place there is one, too
        return next((one for one in found if one.process.uid == 0), None)

    return core, await until(manifest, within=60)


def replace_by_link(core: Path) -> None:
    core.unlink()
    core.symlink_to("/etc/passwd")


def replace_by_directory(core: Path) -> None:
    core.unlink()
    core.mkdir()


def replace_by_file_of_another(core: Path) -> None:
    """As by one whom the directory belongs to: what others have in his places he may move."""
    core.unlink()
    core.write_bytes(b"not his to read")
    os.chown(core, 65534, 65534)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "source_vanished"),
        (replace_by_link, "source_unreadable"),
        (replace_by_directory, "source_unreadable"),
        (replace_by_file_of_another, "source_unreadable"),
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
    manifests = [path for _, path in setup.shipper.delivered if path.endswith("/manifest.json")]
    assert not [path for path in manifests if manifest.crash_id in path]


async def test_core_that_waited_is_delivered_from_where_the_documentation_had_it_copied(
    setup: Setup,
) -> None:
    (copy,) = re.findall(r"^cp -a \S+/\. \S+/$", OPERATIONS.read_text(), re.MULTILINE)
    elsewhere = setup.spool.with_name("elsewhere")
    for told, there in (("/tmp/appscope", setup.spool), ("/srv/crashes", elsewhere)):
        copy = copy.replace(told, str(there))
    elsewhere.mkdir()

    def move(_: Path) -> None:
        subprocess.run(copy, shell=True, check=True)
        shutil.rmtree(setup.spool)
        setup.collector.change(CRASHBUS_SPOOL=str(elsewhere))

    core, manifest = await lose_core(setup, move)

    assert len(manifest.files) == 4
    await setup.shipper.has(FILE, core.name, "manifest.json")
    assert not await setup.bus.stored(DeadLetter)


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


async def test_state_that_cannot_be_used_is_said_in_one_line(setup: Setup) -> None:
    setup.collector._environment["CRASHBUS_STATE"] = "/proc/nowhere"
    await ends_with(setup, "CRASHBUS_STATE")


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
    await ends_with(setup, "CRASHBUS_DESTINATIONS")


async def test_server_that_takes_too_small_messages_is_said_in_one_line(
    setup: Setup, tmp_path: Path
) -> None:
    directory = tmp_path / "small"
    directory.mkdir()
    server = NatsServer(directory, "max_payload: 65536\n")
    server.start()
    setup.collector._environment["CRASHBUS_NATS_URL"] = server.url
    try:
        await ends_with(setup, "max_payload 65536 is too small")
    finally:
        server.stop()


async def ends_with(setup: Setup, text: str) -> None:
    """Let the collector end by itself, for a reason that it tells in words."""
    await setup.collector.start()
    assert await setup.collector.wait(60) == 2
    assert text in setup.collector.log
    assert "Traceback" not in setup.collector.log
