"""``crashbus retry``: what failed for good is delivered once its cause is mended."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from crashbus import Bus, DeadLetter, Manifest, Replay
from crashbus.cli.crashes import Crash, State
from crashbus.cli.retry import Wanted, replays
from tests.cli.support import EPOCH, Command, Result, make
from tests.support.crashers import crasher
from tests.support.nats import NatsServer, stored
from tests.support.requirements import need_root
from tests.support.service import ServiceProcess
from tests.support.wait import until


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
        process = await asyncio.to_thread(subprocess.run, [crasher("appscope_like"), self.spool])

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
    assert letters[-1].reason == "source_gone"


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
