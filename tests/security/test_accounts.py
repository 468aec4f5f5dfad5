"""The secured bus: each user can do its job, and nothing else."""

import re
from collections.abc import Iterator

import pytest

from crashbus import connect, streams
from crashbus.keys import USERS
from tests.support.nats import SecuredNats
from tests.support.requirements import need_program

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
        r"|\$JS\.API\.STREAM\.(PURGE|MSG\.DELETE)\.CRASH_(CHUNKS|SMALL|FILES)"
        r"|\$JS\.API\.DIRECT\.GET\.CRASH_(CHUNKS|SMALL)"
        rf"|{LISTEN}|\$JS\.API\.STREAM\.MSG\.GET\.CRASH_(FILES|CHUNKS|SMALL)"
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
        r"crash\.(signal|count|lost|report|shipped|failed|postponed)\.>",
    ),
    "operator": (r"crash\..*|\$JS\..*", r"crash\..*|\$JS\.EVENT\.>"),
}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredNats]:
    need_program("nats-server")
    need_program("openssl")
    server = SecuredNats(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop()


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
    for what, given, pattern in (("publish", PUBLISHED, may_publish), ("tion", HEARD, may_hear)):
        allowed = {one for one in given if one.lower() not in refused[what]}
        assert allowed == {one for one in given if re.fullmatch(pattern, one)}


async def test_who_has_no_key_is_refused(secured: SecuredNats) -> None:
    options = secured.options("operator")
    del options["nkeys_seed"]
    with pytest.raises(Exception, match="uthorization"):
        async with connect(**options):
            pass
