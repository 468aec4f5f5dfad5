"""tail, ls and show against a real server that holds real messages."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from crashbus import Bus, Message, Postponed, SignalCount
from crashbus.cli import bus as cli_bus
from crashbus.cli import tail
from crashbus.cli.ls import moment_given
from crashbus.errors import BusUnreachable, NoStreams
from crashbus.layout import Kind
from crashbus.streams import stream_of
from tests.cli.support import Command, MadeCrash, crashbus, make
from tests.support.nats import NatsServer
from tests.support.wait import until


def settings(server: NatsServer) -> dict[str, str]:
    return {"CRASHBUS_NATS_URL": server.url}


async def publish_until_seen(bus: Bus, made: MadeCrash, command: Command, seen: bytes) -> None:
    """Publish over and over, for nothing tells when a follower has begun to listen."""
    count = 0

    async def shown() -> bool:
        nonlocal count
        count += 1
        event = made.event.model_copy(update={"event_id": f"{made.id}-{count}"})
        with suppress(BusUnreachable):  # a server that is coming back
            await bus.publish(event)
        return seen in command.out

    await until(shown, within=60, every=0.1)


async def test_tail_shows_every_kind_as_it_happens(nats_server: NatsServer, bus: Bus) -> None:
    made = make(destinations=("file:///somewhere",))
    async with Command("tail", env=settings(nats_server)) as tail:
        await publish_until_seen(bus, made, tail, b"SIGSEGV nginx[4711] dies")
        count = SignalCount(
            host=made.manifest.host,
            crash_id=made.id,
            process=made.manifest.process,
            signal=11,
            signal_name="SIGSEGV",
            count=7,
            period=1,
        )
        others = (made.postponed(), made.replay(), made.failure())
        for message in (count, made.manifest, made.receipts()[0], *others):
            await bus.publish(message)
        last = (b"make the bucket", b"postponed refused: ", b"asked for again ")
        await until(lambda: all(one in tail.out for one in last))
        out = tail.out.decode()
        assert "handled 7 more times by nginx[4711]" in out
        assert "reported nginx[4711] SIGSEGV, 3 files, 2.9 MiB" in out
        assert f"file:///somewhere/{made.manifest.folder}/info_" in out
        assert made.id in out
        assert "nobody listens; next try 23:08:19Z" in out
        tail.interrupt()
        result = await tail.result()
    assert result.status == 130
    assert "Traceback" not in result.err


async def test_tail_follows_what_newer_services_make_a_stream_for_while_it_runs(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tail, "_LOOK_AGAIN", 0.05)
    made = make(destinations=("file:///somewhere",))
    await bus._js.delete_stream(stream_of(Postponed))
    subscribe, said, lacked = bus.subscribe, "", asyncio.Event()

    async def subscribed(*arguments: Any) -> AsyncIterator[Message]:
        try:
            async for message in subscribe(*arguments):
                yield message
        except NoStreams:
            lacked.set()
            raise

    async def shown() -> bool:
        nonlocal said
        await bus.publish(made.postponed())
        said += capsys.readouterr().out
        return made.id in said

    monkeypatch.setattr(bus, "subscribe", subscribed)
    following = tail._follow(bus, Postponed, Postponed.SUBJECT, as_json=True, may_lack=True)
    task = asyncio.create_task(following)
    await lacked.wait()
    await bus.ensure_streams()
    await until(shown, every=0.1)
    task.cancel()
    await asyncio.wait({task})


async def test_tail_json_is_one_object_a_line_of_the_kind_asked_for(
    nats_server: NatsServer, bus: Bus
) -> None:
    made = make(destinations=("file:///somewhere",))
    arguments = ("tail", "crash.*.web%2E1.>", "--kind", "signals", "--json")
    async with Command(*arguments, env=settings(nats_server)) as tail:
        await publish_until_seen(bus, made, tail, b"}\n")
        await bus.publish(made.manifest)
        elsewhere = make(4712, host="web2")
        await bus.publish(elsewhere.event)
        last = made.event.model_copy(update={"event_id": "last"})
        await bus.publish(last)
        await until(lambda: b'"last"' in tail.out)
        lines = [json.loads(line) for line in tail.out.decode().splitlines()]
    assert {one["message"] for one in lines} == {"SignalEvent"}
    assert {one["host"] for one in lines} == {"web.1"}
    assert lines[-1]["process"]["comm"] == "nginx"


async def test_tail_goes_on_after_the_server_was_killed(nats_server: NatsServer, bus: Bus) -> None:
    made = make()
    async with Command("tail", env=settings(nats_server)) as tail:
        await publish_until_seen(bus, made, tail, b"nginx[4711]")
        await asyncio.to_thread(nats_server.kill)
        await asyncio.to_thread(nats_server.start)
        await publish_until_seen(bus, make(4712, name="after"), tail, b"after[4712]")


async def test_tail_of_a_subject_where_nothing_is_published(nats_server: NatsServer) -> None:
    result = await crashbus("tail", "crash.chunk.>", env=settings(nats_server))
    assert result.status == 1
    assert result.err.startswith("crashbus: no messages to follow on 'crash.chunk.>'; ")


async def test_ls_lists_crashes_with_their_states(nats_server: NatsServer, bus: Bus) -> None:
    delivered = make(1, destinations=("file:///a",), crashed_at=1795393639)
    failed = make(2, destinations=("file:///a",), crashed_at=1795393640, host="web2")
    lost = make(3, crashed_at=1795393641)
    await delivered.publish(bus)
    await failed.publish(bus, receipts=False)
    await bus.publish(failed.failure())
    await bus.publish(lost.event)

    result = await crashbus("ls", env=settings(nats_server))
    assert result.status == 0, result.err
    heading, *lines = (line.split() for line in result.out.splitlines())
    assert heading == ["TIME", "CRASH", "HOST", "PROCESS", "SIGNAL", "FILES", "SIZE", "STATE"]
    assert [(line[2], line[-1]) for line in lines] == [
        (lost.id, "captured"),
        (failed.id, "failed"),
        (delivered.id, "delivered"),
    ]
    assert lines[2] == [
        *("2026-11-23", "00:27:19Z"),
        *(delivered.id, "web.1", "nginx[1]", "SIGSEGV", "3", "2.9", "MiB", "delivered"),
    ]

    only_failed = await crashbus("ls", "--failed", "--json", env=settings(nats_server))
    assert [json.loads(line)["crash_id"] for line in only_failed.out.splitlines()] == [failed.id]
    of_host = await crashbus("ls", "--host", "web.1", "-n", "1", env=settings(nats_server))
    assert [line.split()[2] for line in of_host.out.splitlines()[1:]] == [lost.id]


async def test_ls_lists_the_crashes_of_a_bug_or_since_a_time(
    nats_server: NatsServer, bus: Bus
) -> None:
    now = time.time()
    for pid, age, fingerprint in ((1, 7300, "a"), (2, 7100, "a"), (3, 60, "b")):
        made = make(pid, crashed_at=now - age).manifest
        await bus.publish(made.model_copy(update={"fingerprint": fingerprint * 16}))

    async def listed(*arguments: str) -> list[tuple[str, str]]:
        result = await crashbus("ls", "--json", *arguments, env=settings(nats_server))
        assert result.status == 0, result.err
        rows = [json.loads(line) for line in result.out.splitlines()]
        return [(row["process"], row["fingerprint"]) for row in rows]

    first, second, third = (("nginx[1]", "a" * 16), ("nginx[2]", "a" * 16), ("nginx[3]", "b" * 16))
    assert await listed() == [third, second, first]
    assert await listed("--since", "2h") == [third, second]
    lost = make(4, destinations=("file:///crashes",)).failure()  # of which nothing else is known
    await bus.publish(lost)
    assert (await listed("--since", "2h"))[1:] == [third, second]
    assert await listed("--fingerprint", "AAAA") == [second, first]
    wrong = await crashbus("ls", "--since", "lately", env=settings(nats_server))
    assert (wrong.status, "'lately' is no time; give 2h" in wrong.err) == (1, True)


async def test_ls_shows_no_old_crash_whose_files_arrived_lately(
    nats_server: NatsServer, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bus, "_CLOCKS", 0)
    for name, value in settings(nats_server).items():
        monkeypatch.setenv(name, value)
    made = make(1, crashed_at=time.time() - 7300, destinations=("file:///crashes",))
    await bus.publish(made.manifest)
    delivered = time.time()
    for receipt in made.receipts():
        await bus.publish(receipt)

    assert not await asyncio.to_thread(cli_bus.stored_crashes, None, delivered)


@pytest.mark.parametrize(
    ("text", "moment"),
    [("90s", 910), ("2m", 880), ("1970-01-01T00:10:00Z", 600), ("1970-01-02", 86400)],
)
def test_a_time_is_an_age_or_a_moment_of_utc(text: str, moment: float) -> None:
    assert moment_given(text, now=1000) == moment


async def test_a_whole_id_is_found_without_a_look_at_other_crashes(
    nats_server: NatsServer, bus: Bus
) -> None:
    """What is malformed is complained of by whoever reads it."""
    made = make(1, destinations=("file:///is/not/here",))
    await made.publish(bus, receipts=False)
    await bus.publish(made.failure())
    for subject in ("report.web%2E1", "shipped.web%2E1", "failed.web%2E1", "signal.other"):
        await bus.publish_raw(f"crash.{subject}.{make(2).id}", b"\xc1")

    show = await crashbus("show", made.id, env=settings(nats_server))
    assert "SIGSEGV nginx[1] dies" in show.out
    retry = await crashbus("retry", made.id, "--json", env=settings(nats_server))
    assert json.loads(retry.out)["crash_id"] == made.id
    assert (show.err, retry.err) == ("", "")
    beginning = await crashbus("show", made.id[:15], env=settings(nats_server))
    assert beginning.err.count("malformed message") == 4


async def test_ls_survives_a_malformed_message_and_says_so(
    nats_server: NatsServer, bus: Bus
) -> None:
    await make(1).publish(bus)
    await bus.publish_raw("crash.report.x.\x1b[31m", b"\xc1")
    result = await crashbus("ls", env=settings(nats_server))
    assert result.status == 0
    assert make(1).id in result.out
    assert "malformed message on crash.report.x.\\x1b[31m" in result.err
    assert "\x1b" not in result.err


async def test_show_tells_all_of_a_crash(nats_server: NatsServer, bus: Bus, tmp_path: Path) -> None:
    destination = tmp_path / "delivered"
    made = make(destinations=(destination.as_uri(),), executable="/opt/\x1b[31m[red]x")
    made.deliver(destination)
    await made.publish(bus)
    await bus.publish(made.failure())

    result = await crashbus("show", made.id[:6], env=settings(nats_server))
    assert result.status == 0, result.err
    assert f"Crash {made.id}: delivered" in result.out
    assert "SIGSEGV (11) address not mapped to object" in result.out
    assert "/opt/\\x1b[31m[red]x" in result.out
    assert "\x1b" not in result.out
    for file in made.manifest.files:
        assert file.sha256 in result.out
        assert f"{made.manifest.folder}/{file.stored_name}" in result.out
    assert "#0 main + 4" in result.out
    assert "mend: make the bucket" in result.out

    as_json = json.loads((await crashbus("show", made.id, "--json", env=settings(nats_server))).out)
    assert as_json["state"] == "delivered"
    assert as_json["manifest"] == made.manifest.model_dump(mode="json")
    assert as_json["backtraces"][made.file(Kind.BACKTRACE).name].endswith("#0 main + 4\n")


async def test_show_works_without_the_destination(nats_server: NatsServer, bus: Bus) -> None:
    made = make(destinations=("file:///is/not/here",))
    await made.publish(bus)
    result = await crashbus("show", made.id, env=settings(nats_server))
    assert result.status == 0
    assert "file:///is/not/here has no web.1/" in result.out


async def test_show_of_an_event_alone(nats_server: NatsServer, bus: Bus) -> None:
    made = make()
    await bus.publish(made.event)
    result = await crashbus("show", made.id, env=settings(nats_server))
    assert result.status == 0
    assert f"Crash {made.id}: not captured" in result.out
    got = await crashbus("get", made.id, env=settings(nats_server))
    assert (got.status, got.out) == (1, "")
    assert got.err == f"crashbus: crash {made.id} has no files; crashbus show {made.id} says why\n"


async def test_an_unknown_id(nats_server: NatsServer, bus: Bus) -> None:
    result = await crashbus("show", "0" * 16, env=settings(nats_server))
    assert result.status == 1
    assert result.err == (
        f"crashbus: no crash '{'0' * 16}' on the bus; crashbus ls shows what there is\n"
    )


async def test_a_bus_without_streams(nats_server: NatsServer) -> None:
    for command in ("ls", "tail"):
        result = await crashbus(command, env=settings(nats_server))
        assert result.status == 1
        assert result.err == (
            "crashbus: the bus has no Crashbus streams; start a collector on it, it makes them\n"
        )


async def test_a_password_in_the_url_is_not_shown() -> None:
    url = "nats://crash:secret@127.0.0.1:1,nats://token@127.0.0.1:2"
    result = await crashbus("--nats-url", url, "ls")
    assert result.status == 1
    assert "nats://…@127.0.0.1:1,nats://…@127.0.0.1:2" in result.err
    assert "secret" not in result.err
    assert "token" not in result.err


async def test_no_bus() -> None:
    result = await crashbus("--nats-url", "nats://127.0.0.1:1", "ls")
    assert result.status == 1
    assert result.err.startswith("crashbus: no NATS server answers at nats://127.0.0.1:1 ")
    assert result.err.count("\n") == 1


async def test_a_bus_that_wants_a_password(tmp_path: Path) -> None:
    server = NatsServer(tmp_path, "authorization {\n  user: crash\n  password: right\n}\n")
    server.start()
    try:
        wrong = {"CRASHBUS_NATS_USER": "crash", "CRASHBUS_NATS_PASSWORD": "wrong"}
        result = await crashbus("ls", env={**settings(server), **wrong})
        assert result.status == 1
        assert "refuses us: nats: 'Authorization Violation'; set CRASHBUS_" in result.err
        assert "wrong" not in result.err
        right = {**wrong, "CRASHBUS_NATS_PASSWORD": "right"}
        result = await crashbus("ls", env={**settings(server), **right})
        assert "no Crashbus streams" in result.err
    finally:
        server.stop()
