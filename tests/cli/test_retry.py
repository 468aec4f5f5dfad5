"""``crashbus retry``: what failed for good is delivered once its cause is mended."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from crashbus import Bus, DeadLetter, Manifest, Replay, streams
from crashbus.cli.crashes import Crash, State
from crashbus.cli.retry import Wanted, replays
from crashbus.layout import Kind
from tests.cli.support import EPOCH, Command, Result, make
from tests.support.crashers import crasher
from tests.support.nats import NatsServer, stored
from tests.support.requirements import need_root
from tests.support.service import ServiceProcess
from tests.support.wait import until

LOOKED = "compared failures with the bus"


@dataclass
class Host:
    bus: Bus
    nats: NatsServer
    spool: Path
    base: Path
    collector: ServiceProcess

    async def command(self, *arguments: str) -> Result:
        environment = {"CRASHBUS_NATS_URL": self.nats.url}
        async with Command(*arguments, env=environment) as command:
            return await command.result()

    async def crash(self) -> Manifest:
        command, without_core = [crasher("appscope_like"), self.spool], {"WITHOUT_CORE": "1"}
        process = await asyncio.to_thread(subprocess.run, command, env=without_core)

        async def look() -> Manifest | None:
            found = await self.bus.stored(Manifest)
            return next((one for one in found if one.process.pid), None) if found else None

        assert process.returncode
        return await until(look)

    async def state(self, crash_id: str) -> str:
        shown = await self.command("show", crash_id, "--json")
        assert not shown.status, shown.err
        return str(json.loads(shown.out)["state"])


@pytest.fixture
async def host(tmp_path: Path, nats_server: NatsServer, bus: Bus) -> AsyncIterator[Host]:
    """A collector and a shipper whose destination is no directory, but a file."""
    need_root()
    spool, base = tmp_path / "appscope", tmp_path / "base"
    tmp_path.chmod(0o755)
    spool.mkdir()
    spool.chmod(0o1777)
    base.write_text("in the way")
    environment = {
        "CRASHBUS_NATS_URL": nats_server.url,
        "CRASHBUS_HOST": "test-host",
        "CRASHBUS_SPOOL": str(spool),
        "CRASHBUS_STATE": str(tmp_path / "state"),
        "CRASHBUS_DESTINATIONS": base.as_uri(),
        "CRASHBUS_COLLECTOR_RECHECK": "1",
    }
    services = [ServiceProcess(name, tmp_path, environment) for name in ("collector", "shipper")]
    for service in services:
        await service.start()
    await services[0].healthy(within=60)
    yield Host(bus, nats_server, spool, base, services[0])
    for service in services:
        await service.stop()


async def test_what_failed_for_good_is_delivered_once_it_is_mended(host: Host) -> None:
    manifest = await host.crash()
    letters = await stored(host.bus, DeadLetter, len(manifest.files))
    assert {letter.reason for letter in letters} == {"not_a_directory"}
    assert await host.state(manifest.crash_id) == State.FAILED
    # The sources are kept, and a restart does not lose sight of what failed.
    await host.collector.stop()
    await host.collector.start()
    host.base.unlink()

    done = await host.command("retry", manifest.crash_id[:10])

    assert done.status == 0, done.err
    assert f"{manifest.crash_id}: {len(manifest.files)} file(s) again to" in done.out
    folder = host.base / manifest.folder
    await until(lambda: (folder / "manifest.json").exists(), within=60)
    for file in manifest.files:
        assert (folder / file.stored_name).stat().st_size == file.stored_size

    async def delivered() -> bool:
        return await host.state(manifest.crash_id) == State.DELIVERED

    await until(delivered, within=60, every=0.2)
    again = await host.command("retry", "--all")
    assert again.status == 1
    assert "nothing" in again.err


async def delivered_whole(host: Host, crash_id: str) -> Manifest:
    """Wait until a crash is delivered with its core; return the manifest that lies there."""

    async def delivered() -> bool:
        return await host.state(crash_id) == State.DELIVERED

    await until(delivered, within=60, every=0.2)
    (written,) = host.base.rglob("manifest.json")
    manifest = Manifest.model_validate_json(written.read_bytes())
    for file in manifest.files:
        assert (written.parent / file.stored_name).stat().st_size == file.stored_size
    assert {file.kind for file in manifest.files} >= {Kind.CORE, Kind.INFO}
    # No letter stands any more: there is nothing to retry.
    assert (await host.command("retry", "--all")).status == 1
    return manifest


async def retried(host: Host, crash_id: str) -> None:
    done = await host.command("retry", crash_id)
    assert done.status == 0, done.err
    assert f"{crash_id}: 1 file(s) again to {host.base.as_uri()}" in done.out


async def test_core_that_was_larger_than_the_bus_is_delivered_by_a_retry(host: Host) -> None:
    host.base.unlink()
    config = (await host.bus._js.stream_info(streams.CHUNKS)).config
    config.max_bytes, enough = 100_000, config.max_bytes
    await host.bus._js.update_stream(config)
    manifest = await host.crash()
    (letter,) = await stored(host.bus, DeadLetter)
    assert letter.reason == "larger_than_bus"
    assert "crashbus retry" in letter.mend
    assert await host.state(manifest.crash_id) == State.FAILED
    shown = await host.command("show", manifest.crash_id)
    assert f"crashbus retry {manifest.crash_id}" in shown.out

    config.max_bytes = enough
    await host.bus._js.update_stream(config)
    await retried(host, manifest.crash_id)

    written = await delivered_whole(host, manifest.crash_id)
    assert (written.revision, written.notes) == (2, ())


async def test_core_that_could_not_be_read_is_delivered_by_a_retry(host: Host) -> None:
    host.base.unlink()
    await host.bus.publish_raw("crash.chunk.filler.x", os.urandom(1_040_000))
    config = (await host.bus._js.stream_info(streams.CHUNKS)).config
    config.max_bytes, enough = 1_050_000, config.max_bytes
    await host.bus._js.update_stream(config)
    crashing = asyncio.create_task(host.crash())
    await until(lambda: "waiting for the bus" in host.collector.log)
    (core,) = host.spool.glob("*/core_*")
    host.collector.kill()  # one that runs holds the file open
    await host.collector.wait()
    aside = core.rename(host.spool.parent / "core")
    core.symlink_to(aside)
    config.max_bytes = enough
    await host.bus._js.update_stream(config)
    await host.collector.start()
    manifest = await crashing
    (letter,) = await stored(host.bus, DeadLetter)
    assert letter.reason == "source_unreadable"

    aside.rename(core)
    await retried(host, manifest.crash_id)

    await delivered_whole(host, manifest.crash_id)


async def test_core_that_had_been_changed_is_delivered_by_a_retry(host: Host) -> None:
    manifest = await host.crash()
    await stored(host.bus, DeadLetter, len(manifest.files))
    (core,) = host.spool.glob("*/core_*")
    content = core.read_bytes()
    core.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    host.base.unlink()
    assert (await host.command("retry", "--all")).status == 0
    letters = await stored(host.bus, DeadLetter, len(manifest.files) + 1)
    assert letters[-1].reason == "source_changed"

    core.write_bytes(content)
    await retried(host, manifest.crash_id)

    await delivered_whole(host, manifest.crash_id)


async def test_failures_are_told_again_when_the_bus_has_lost_them(host: Host) -> None:
    manifest = await host.crash()
    count = len(await stored(host.bus, DeadLetter, len(manifest.files)))
    await until(lambda: host.collector.log.count("a destination failed for good") == count)
    await host.collector.stop()
    host.nats.kill()
    host.nats.lose_store()
    host.nats.start()
    host.collector._environment["CRASHBUS_COLLECTOR_RECHECK"] = "0.1"
    await host.collector.start()

    letters = await stored(host.bus, DeadLetter, count)

    assert {(one.reason, one.service) for one in letters} == {("not_a_directory", "collector")}
    assert {one.files[0] for one in letters} == {file.name for file in manifest.files}
    assert all(one.mend and str(host.base) in one.error for one in letters)
    assert await host.state(manifest.crash_id) == State.FAILED
    assert await stored(host.bus, Manifest)  # and who it was that crashed
    # Once only.
    looks = host.collector.log.count(LOOKED)
    await until(lambda: host.collector.log.count(LOOKED) > looks + 1, within=60)
    assert len(await host.bus.stored(DeadLetter)) == count

    host.base.unlink()
    assert (await host.command("retry", manifest.crash_id)).status == 0
    await delivered_whole(host, manifest.crash_id)


async def test_what_still_fails_becomes_a_dead_letter_again(host: Host) -> None:
    manifest = await host.crash()
    before = len(await stored(host.bus, DeadLetter, len(manifest.files)))

    done = await host.command("retry", "--all", "--reason", "not_a_directory")

    assert done.status == 0, done.err
    await stored(host.bus, DeadLetter, before + len(manifest.files))
    assert await host.state(manifest.crash_id) == State.FAILED


async def test_crash_that_the_host_knows_no_more_is_told(host: Host) -> None:
    made = make(destinations=(host.base.as_uri(),), host="test-host")
    await made.publish(host.bus, receipts=False)
    await host.bus.publish(made.failure())

    done = await host.command("retry", made.id)

    assert done.status == 0, done.err
    letters = await stored(host.bus, DeadLetter, 2)
    assert letters[-1].reason == "source_vanished"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("retry",), "--all"),
        (("retry", "abc", "--all"), "--all"),
        (("retry", "abc"), "no crash"),
        (("retry", "--all", "--reason", "x"), "nothing"),
    ],
)
async def test_wrong_use_is_told_with_the_mend(
    bus: Bus, nats_server: NatsServer, arguments: tuple[str, ...], word: str
) -> None:
    async with Command(*arguments, env={"CRASHBUS_NATS_URL": nats_server.url}) as command:
        done = await command.result()
    assert done.status == 1
    assert word in done.err


def failed_crash() -> Crash:
    made = make(destinations=("file:///a",))
    return Crash(made.id, made.manifest, failures=[made.failure()])


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (Wanted(), 1),
        (Wanted(reason="no_such_bucket", destination="file:///a", host="web.1"), 1),
        (Wanted(reason="timeout"), 0),
        (Wanted(destination="file:///b"), 0),
        (Wanted(host="web.2"), 0),
    ],
)
def test_only_what_is_meant_is_asked_for(wanted: Wanted, count: int) -> None:
    assert len(replays(failed_crash(), wanted)) == count


def test_crash_that_was_asked_for_again_is_being_delivered_until_it_fails_again() -> None:
    crash = failed_crash()
    (asked,) = replays(crash, Wanted())
    crash.replays.append(asked)
    assert crash.state(EPOCH + 1e4) is State.DELIVERING
    assert replays(crash, Wanted()) == []

    letter = crash.failures[0]
    crash.failures.append(letter.model_copy(update={"time": letter.time + 1}))
    assert crash.state(EPOCH + 1e4) is State.FAILED
    assert [type(one) for one in replays(crash, Wanted())] == [Replay]


def test_what_the_collector_gave_up_is_asked_for_at_each_destination() -> None:
    """Its dead letters have no work item: it could not read the file."""
    made = make(destinations=("file:///a", "file:///b"))
    name = made.file(Kind.CORE).name
    work = {"work": None, "destinations": ("file:///a", "file:///b"), "files": (name,)}
    crash = Crash(made.id, made.manifest, failures=[made.failure().model_copy(update=work)])

    asked = replays(crash, Wanted())
    assert [(one.destination, one.files) for one in asked] == [
        ("file:///a", (name,)),
        ("file:///b", (name,)),
    ]
    assert [one.destination for one in replays(crash, Wanted(destination="file:///b"))] == [
        "file:///b"
    ]

    crash.replays.append(asked[0])
    assert crash.state(EPOCH + 1e4) is State.FAILED
    assert [one.destination for one in replays(crash, Wanted())] == ["file:///b"]
    crash.replays.append(asked[1])
    assert crash.state(EPOCH + 1e4) is State.DELIVERING


def test_loss_that_nothing_can_bring_back_is_not_asked_for() -> None:
    made = make(destinations=("file:///a",))
    lost = made.failure().model_copy(update={"work": None, "reason": "source_vanished"})
    crash = Crash(made.id, made.manifest, failures=[lost])
    assert replays(crash, Wanted()) == []
    assert crash.state(EPOCH + 1e4) is State.FAILED
