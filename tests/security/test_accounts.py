"""The secured bus: each user can do its job, and nothing else."""

import re
from contextlib import suppress
from pathlib import Path

import pytest

from crashbus import Bus, connect, streams
from crashbus.chunks import Chunk
from crashbus.errors import BusUnreachable, NotPermitted
from crashbus.keys import USERS
from crashbus.layout import Kind
from services.collector.ledger import Source
from tests.collector.conftest import Delivering, reported_crash
from tests.support.nats import SecuredNats
from tests.support.requirements import lacking
from tests.support.wait import until

CRASH_ID = "0" * 16
STREAMS = [config.name for config in streams.all_streams(1)]
LISTENED = ("CRASH_SIGNALS", "CRASH_REPORTS", "CRASH_RECEIPTS", "CRASH_FAILURES")
TOLD = (*LISTENED, "CRASH_POSTPONED", "CRASH_RETRIES")
KINDS = (
    *("signal", "count", "lost", "file", "chunk", "small", "report", "shipped", "failed"),
    *("postponed", "retry"),
)

STREAM_REQUESTS = (
    *("CREATE", "UPDATE", "DELETE", "PURGE", "INFO"),
    *("MSG.GET", "MSG.DELETE", "SNAPSHOT", "RESTORE"),
)

# Everything that someone might try. Requests have a body that the server does not understand.
PUBLISHED = [
    *(f"crash.{kind}.h.x" for kind in KINDS),
    *(
        f"$JS.API.STREAM.{what}.{stream}"
        for stream in (*STREAMS, "OTHER")
        for what in STREAM_REQUESTS
    ),
    *(f"$JS.API.CONSUMER.{what}.{s}" for s in STREAMS for what in ("LIST", "NAMES", "CREATE")),
    *(
        f"$JS.API.CONSUMER.{what}.{stream}.x"
        for stream in STREAMS
        for what in ("CREATE", "DURABLE.CREATE", "INFO", "DELETE", "MSG.NEXT")
    ),
    *(f"$JS.API.DIRECT.GET.{stream}" for stream in STREAMS),
    *(f"$JS.ACK.{stream}.x.1.1.1.1.1" for stream in STREAMS),
    *("$JS.API.INFO", "$JS.API.STREAM.LIST", "$JS.API.STREAM.NAMES"),
    *("$SYS.REQ.SERVER.PING", "_INBOX.someone.x", "anything"),
]
HEARD = [
    *(f"crash.{kind}.>" for kind in KINDS),
    *(">", "*", "crash.>", "_INBOX.>", "_INBOX.someone.>", "$JS.API.>", "$SYS.>"),
    *("$JS.ACK.>", "$JS.EVENT.>", "anything"),
]


def works_on(*names: str) -> str:
    """Return a pattern of what one needs who takes work from these streams."""
    some = "|".join(names)
    consumer = r"CONSUMER\.(INFO|CREATE|MSG\.NEXT)"
    return rf"\$JS\.API\.{consumer}\.({some})\.x|\$JS\.ACK\.({some})\..*"


LISTEN = rf"\$JS\.API\.STREAM\.(INFO|MSG\.GET)\.({'|'.join(LISTENED)})"
# user: what it may publish, what it may hear beside answers to itself
ALLOWED = {
    "detector": (r"crash\.(signal|count|lost|failed)\..*", ""),
    "recorder": (r"crash\.failed\..*", ""),
    "collector": (
        r"crash\.(file|chunk|small|report|failed)\..*"
        r"|\$JS\.API\.STREAM\.(INFO\..*|CREATE\.CRASH_.*)"
        r"|\$JS\.API\.STREAM\.PURGE\.CRASH_(CHUNKS|SMALL|FILES)"
        rf"|{LISTEN}|\$JS\.API\.STREAM\.MSG\.GET\.CRASH_FILES"
        rf"|{works_on('CRASH_SIGNALS', 'CRASH_RECEIPTS', 'CRASH_FAILURES', 'CRASH_RETRIES')}",
        "",
    ),
    "shipper": (
        r"crash\.(shipped|failed|postponed)\..*"
        r"|\$JS\.API\.STREAM\.(INFO|MSG\.GET|MSG\.DELETE)\.CRASH_FILES"
        r"|\$JS\.API\.STREAM\.(INFO|MSG\.GET)\.CRASH_RECEIPTS"
        r"|\$JS\.API\.CONSUMER\.(LIST\.CRASH_FILES|DELETE\.CRASH_FILES\.x)"
        r"|\$JS\.API\.DIRECT\.GET\.CRASH_(CHUNKS|SMALL)"
        rf"|{works_on('CRASH_FILES')}",
        "",
    ),
    "consumer": (
        rf"\$JS\.API\.STREAM\.(INFO|MSG\.GET)\.({'|'.join(TOLD)})",
        r"crash\.(signal|count|lost|report|shipped|failed|postponed|retry)\.>",
    ),
    "operator": (r"crash\..*|\$JS\..*", r"crash\..*|\$JS\.EVENT\.>"),
}
# What a server before 2.9.15 is asked for.
DELETING = (
    r"\$JS\.API\.STREAM\.MSG\.DELETE\.CRASH_(CHUNKS|SMALL|FILES)"
    r"|\$JS\.API\.(DIRECT|STREAM\.MSG)\.GET\.CRASH_(CHUNKS|SMALL)"
)


@pytest.mark.parametrize("user", USERS)
async def test_a_user_may_do_what_it_does_and_nothing_else(secured: SecuredNats, user: str) -> None:
    refusals: list[str] = []

    async def note(error: Exception) -> None:
        refusals.append(str(error))

    async with connect(**secured.options(user), error_cb=note) as bus:
        client = bus._client
        for subject in PUBLISHED:
            await client.publish(subject, b"no such request")
        for subject in HEARD:
            await client.subscribe(subject)
        await client.flush(60)  # the server answers in order

    said = "\n".join(refusals)
    refused = {kind: set(re.findall(rf'{kind} to "([^"]+)"', said)) for kind in ("publish", "tion")}
    may_publish, may_hear = ALLOWED[user]
    if user == "collector" and not secured.counts_purges:
        may_publish += f"|{DELETING}"
    for what, given, pattern in (("publish", PUBLISHED, may_publish), ("tion", HEARD, may_hear)):
        allowed = {one for one in given if one.lower() not in refused[what]}
        assert allowed == {one for one in given if re.fullmatch(pattern, one)}


async def test_a_collector_removes_chunks_that_it_may_not_read(pinned: str, tmp_path: Path) -> None:
    server = SecuredNats(tmp_path, program=pinned)
    assert server.counts_purges
    server.start()
    try:
        async with connect(**server.options("collector"), host="h") as bus:
            await bus.ensure_streams()
            for index in range(3):
                await bus.publish_chunk(CRASH_ID, "core_1", Chunk(index, 1, b"secret", ""))
            await bus.purge_crash(CRASH_ID)
            assert await bus.chunk_count(CRASH_ID, "core_1") == 0
    finally:
        server.stop()


async def test_a_collector_need_not_read_back_what_went_over_tls(
    secured: SecuredNats, bus: Bus, tmp_path: Path
) -> None:
    """Where there is want of room, and a copy goes; see decisions/0029."""
    source = Source(directory="7", name="core_1", kind=Kind.CORE)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "core_1").write_bytes(b"core")
    for encrypted in (True, False):
        options = secured.options("collector") if encrypted else {"url": _url_of(bus)}
        async with connect(**options, host="h") as one:
            await one.ensure_streams()
            assert one.is_encrypted is encrypted
            own, crash = Delivering(one, tmp_path), reported_crash(source)
            source.file = await own.publisher.publish(crash.crash_id, source)
            assert await own.deliverer.offering.is_whole_on_bus(crash, source)
            assert one._client.refusals == 0
            if not encrypted:
                await one.purge_chunks(crash.crash_id, source.name)
                assert not await own.deliverer.offering.is_whole_on_bus(crash, source)


def _url_of(bus: Bus) -> str:
    assert bus._client.connected_url is not None
    return str(bus._client.connected_url.geturl())


async def test_an_old_server_that_does_not_let_chunks_be_deleted_is_told_what_to_permit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = SecuredNats(tmp_path)
    if server.counts_purges:
        lacking("needs a nats-server before 2.9.15, as Debian 12 has")
    server.forbid_deleting()
    server.start()
    try:
        async with connect(**server.options("collector"), host="h") as bus:
            await bus.ensure_streams()
            await bus.publish_chunk(CRASH_ID, "core_1", Chunk(0, 1, b"x", ""))
            for _ in range(2):  # the server is asked, then what it said is remembered
                with pytest.raises(NotPermitted):
                    await bus.purge_chunks(CRASH_ID, "core_1")
                await bus.purge_chunks(CRASH_ID, "core_2")  # of which there is nothing to remove
            assert re.search(r"nats-server 2\.[\d.]+ needs the lines that deploy/nats", caplog.text)
            server.permit_deleting()
            server.reload()
            await until(lambda: purged(bus), within=60)
    finally:
        server.stop()


async def purged(bus: Bus) -> bool:
    with suppress(BusUnreachable):  # the old permissions still hold, or the server is reading them
        await bus.purge_chunks(CRASH_ID, "core_1")
        return await bus.chunk_count(CRASH_ID, "core_1") == 0
    return False


async def test_who_has_no_key_is_refused(secured: SecuredNats) -> None:
    options = secured.options("operator")
    del options["nkeys_seed"]
    with pytest.raises(Exception, match="uthorization"):
        async with connect(**options):
            pass
