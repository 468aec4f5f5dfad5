"""The shipped compose file as a user starts it, on a real engine: crashes of containers of all
kinds arrive in a real S3 store and in a volume, services are killed, and nothing is left behind.
"""

import asyncio
import hashlib
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import pytest_asyncio
import zstandard
from minio import Minio

from crashbus import Bus, Manifest, Receipt, connect
from crashbus.errors import CrashbusError
from crashbus.keys import SEED, USERS
from crashbus.layout import MANIFEST_NAME, Kind
from crashbus.messages import DeadLetter, SignalEvent
from tests.compose.stack import OTHERS, Stack
from tests.support import core_pattern
from tests.support.core_pattern import core_pattern_kept
from tests.support.docker import IMAGE, Engine
from tests.support.requirements import need_btf, need_program, need_root
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

S3, VOLUME = "s3://crashes/host", "file:///var/crashes"
SERVICES = ("nats", "detector", "recorder", "guard", "collector", "shipper", "storage")
WITHIN = 90  # seconds for a crash to be delivered on a busy machine


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    need_root()
    need_btf()
    need_program("dockerd")
    made = Engine()
    yield made
    made.close()


@pytest.fixture(scope="module")
def built(engine: Engine) -> Iterator[Stack]:
    """All images; nothing runs."""
    made = Stack(engine)
    try:
        made.build()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def stack(built: Stack) -> Iterator[Stack]:
    """Everything, healthy; at the end nothing of it may be left."""
    with core_pattern_kept():
        before = core_pattern.current(), core_pattern.pipe_limit()
        try:
            built.up()
            yield built
        finally:
            built.down()
        assert (core_pattern.current(), core_pattern.pipe_limit()) == before
    assert (
        built.docker("ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project") == ""
    )
    assert built.docker("volume", "ls", "--quiet") == ""
    assert built.docker("network", "ls", "--quiet", "--filter", "name=crashbus") == ""
    assert str(built.directory) not in Path("/proc/self/mountinfo").read_text().replace(
        str(built.engine.socket.parent), ""
    )
    assert {one.name for one in Path("/run/crashbus").iterdir()} <= {"recorder.lock"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bus(stack: Stack) -> AsyncIterator[Bus]:
    url, seed = f"nats://{stack.address('nats')}:4222", str(stack.keys / "operator" / SEED)
    async with connect(url, nkeys_seed=seed) as connected:
        yield connected


@pytest.fixture(scope="module")
def store(stack: Stack) -> Minio:
    address = f"{stack.address('storage')}:8333"
    return Minio(address, stack.access_key, stack.secret_key, secure=False, region="us-east-1")


def stored(store: Minio, receipt: Receipt) -> bytes:
    """Return the content that a receipt of the S3 store tells of."""
    place = urlsplit(receipt.url)
    answer = store.get_object(place.netloc, unquote(place.path.lstrip("/")))
    try:
        raw = bytes(answer.read())
    finally:
        answer.close()
        answer.release_conn()
    if receipt.file.encoding != "zstd":
        return raw
    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read()


async def manifest_of(bus: Bus, container: str) -> Manifest:
    """Return the manifest of the one crash of a container."""

    async def look() -> Manifest | None:
        for manifest in reversed(await bus.stored(Manifest)):
            crashed_in = manifest.process.container
            if crashed_in is not None and crashed_in.id == container:
                return manifest
        return None

    return await until(look, WITHIN, every=0.2)


async def delivered(stack: Stack, bus: Bus, container: str) -> tuple[Manifest, list[Receipt]]:
    """Return a container's crash and its receipts once both destinations have all of it."""
    manifest = await manifest_of(bus, container)
    subject = f"crash.shipped.{manifest.host}.{manifest.crash_id}"

    async def look() -> list[Receipt] | None:
        latest = await manifest_of(bus, container)
        wanted = {file.name for file in latest.files} | {MANIFEST_NAME}
        receipts = await bus.stored(Receipt, subject)
        got = {one: {r.file.name for r in receipts if r.destination == one} for one in (S3, VOLUME)}
        return receipts if all(wanted <= names for names in got.values()) else None

    try:
        receipts = await until(look, WITHIN, every=0.2)
    except TimeoutError:
        raise TimeoutError(f"{await bus.stored(DeadLetter)}\n{stack.logs()}") from None
    return await manifest_of(bus, container), receipts


def check_contents(store: Minio, receipts: list[Receipt]) -> dict[str, bytes]:
    """What lies in the bucket is bit for bit what was gathered; return it by name."""
    found = {}
    latest = {one.file.name: one for one in receipts if one.destination == S3}
    # A second revision may take its place just now, when files of AppScope's join a crash.
    manifest = latest.pop(MANIFEST_NAME)
    assert json.loads(stored(store, manifest))["crash_id"] == manifest.crash_id
    for receipt in latest.values():
        content = stored(store, receipt)
        assert hashlib.sha256(content).hexdigest() == receipt.file.sha256, receipt.file.name
        assert len(content) == receipt.file.size
        found[receipt.file.name] = content
    return found


def one_of(files: dict[str, bytes], pattern: str) -> bytes:
    (name,) = [name for name in files if re.fullmatch(pattern, name)]
    return files[name]


KINDS: list[tuple[str, ...]] = [
    ("--rm", IMAGE, "/null_pointer"),
    ("--read-only", IMAGE, "/null_pointer"),
    ("--tmpfs", "/tmp", "--user", "1234:5678", IMAGE, "/null_pointer"),
    ("--cap-drop", "ALL", "--memory", "32m", IMAGE, "/threads"),
    (
        *("--rm", "--security-opt", "seccomp=unconfined", "--entrypoint", "unshare", OTHERS),
        *("--user", "--map-root-user", "--fork", "sh", "-c", "kill -SEGV $$"),
    ),
]
NAMES = ["rm", "read-only", "tmpfs-and-user", "limits", "user-namespace"]


@pytest.mark.parametrize("arguments", KINDS, ids=NAMES)
async def test_crash_in_a_container_is_delivered_whole(
    stack: Stack, bus: Bus, store: Minio, arguments: tuple[str, ...]
) -> None:
    container = await asyncio.to_thread(stack.engine.run, *arguments)

    manifest, receipts = await delivered(stack, bus, container)

    assert {file.kind for file in manifest.files} >= {
        *(Kind.INFO, Kind.BACKTRACE, Kind.BACKTRACE_JSON, Kind.SNAPSHOT, Kind.CFG, Kind.CORE)
    }
    assert not any(file.truncated for file in manifest.files)
    files = await asyncio.to_thread(check_contents, store, receipts)
    shown = json.loads(one_of(files, r"snapshot_\d+"))["Container"]
    assert shown["Id"] == container
    assert shown["Image"] in (IMAGE, OTHERS)
    assert shown["Name"]
    if IMAGE in arguments:
        frames = json.loads(one_of(files, r"backtrace_\d+\.json"))["threads"][0]["frames"]
        assert frames[0]["symbol"] == "crash_here"
    events = [e for e in await bus.stored(SignalEvent) if e.crash_id == manifest.crash_id]
    assert [event.signal_name for event in events] == ["SIGSEGV"]


async def test_walkthrough(stack: Stack, bus: Bus, store: Minio) -> None:
    """As AppScope's users know it: nginx in a container, its master hit from the host."""
    await asyncio.to_thread(stack.compose, "up", "--detach", "--no-deps", "walkthrough")
    (container,) = stack.containers("walkthrough")
    first = stack.pid(container)
    children = Path(f"/proc/{first}/task/{first}/children")
    master = int(await until(lambda: children.read_text().strip()))
    # Before that it is not nginx yet.
    await until(lambda: b"master" in Path(f"/proc/{master}/cmdline").read_bytes())

    os.kill(master, signal.SIGBUS)

    manifest, receipts = await delivered(stack, bus, container)
    assert (manifest.process.pid, manifest.signal_name) == (master, "SIGBUS")
    files = await asyncio.to_thread(check_contents, store, receipts)
    container_shown = json.loads(one_of(files, r"snapshot_\d+"))["Container"]
    assert container_shown["Name"] == "crashbus-walkthrough-1"
    assert container_shown["Image"] == OTHERS
    assert b"ngx_master_process_cycle" in one_of(files, r"backtrace_\d+")
    (event,) = [e for e in await bus.stored(SignalEvent) if e.process.pid == master]
    assert event.crash_id == manifest.crash_id
    kept = await asyncio.to_thread(stack.volume)
    assert [name for name in kept if manifest.crash_id in name and name.endswith(MANIFEST_NAME)]


async def test_files_of_appscope_are_brought_out_of_a_container(
    stack: Stack, bus: Bus, store: Minio
) -> None:
    """Its library wrote them under the container's own root, which is gone with its end."""
    run = ("--rm", "--tmpfs", "/tmp/appscope:mode=1777", IMAGE, "/libscope.so")
    container = await asyncio.to_thread(stack.engine.run, *run)

    async def both_cores() -> bool:
        manifest = await manifest_of(bus, container)
        return [file.kind for file in manifest.files].count(Kind.CORE) == 2

    await until(both_cores, WITHIN, every=0.2)
    _, receipts = await delivered(stack, bus, container)
    files = await asyncio.to_thread(check_contents, store, receipts)
    assert any(content.startswith(b"Scope Version: v1.4.3") for content in files.values())


async def test_command_shows_what_was_delivered(stack: Stack, bus: Bus) -> None:
    container = await asyncio.to_thread(stack.engine.run, "--rm", IMAGE, "/null_pointer")
    manifest, _ = await delivered(stack, bus, container)

    rows = (await asyncio.to_thread(stack.command, "ls", "--json")).splitlines()

    (row,) = [row for row in map(json.loads, rows) if row["crash_id"] == manifest.crash_id]
    assert row["state"] == "delivered"


async def test_storm_with_every_service_killed_in_its_middle_loses_nothing(
    stack: Stack, bus: Bus, store: Minio
) -> None:
    crashing = asyncio.Semaphore(3)

    async def crash() -> str:
        async with crashing:
            return await asyncio.to_thread(stack.engine.run, "--rm", IMAGE, "/null_pointer")

    storm = [asyncio.create_task(crash()) for _ in range(12)]
    for number, service in enumerate(("collector", "shipper", "nats", "detector", "recorder")):
        await until(lambda n=number: sum(one.done() for one in storm) > 2 * n)  # type: ignore[misc]
        (container, *_) = stack.containers(service)
        killed = stack.pid(container)
        with suppress(ProcessLookupError):
            os.kill(killed, signal.SIGKILL)
        # The engine starts it again by itself.
        await until(lambda c=container, k=killed: stack.pid(c) not in (0, k), WITHIN, every=0.5)  # type: ignore[misc]

    for container in await asyncio.gather(*storm):
        manifest, receipts = await delivered(stack, bus, container)
        # One that was held by the recorder that was killed may be cut short, and says so.
        whole = {Kind.INFO, Kind.BACKTRACE, Kind.SNAPSHOT, Kind.CFG, Kind.CORE}
        assert {file.kind for file in manifest.files} >= whole or manifest.notes
        await asyncio.to_thread(check_contents, store, receipts)


# --- what they may do -----------------------------------------------------------------------------

CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "DAC_READ_SEARCH": 2,
    "FOWNER": 3,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "SYSLOG": 34,
    "PERFMON": 38,
    "BPF": 39,
    "CHECKPOINT_RESTORE": 40,
}
ROOT_SERVICES = {"detector", "recorder", "guard", "collector"}


@pytest.mark.parametrize("service", SERVICES)
async def test_service_has_the_user_and_the_capabilities_that_are_written_down(
    stack: Stack, service: str
) -> None:
    configured = json.loads(stack.compose("config", "--format", "json"))["services"][service]
    for container in stack.containers(service):
        status = Path(f"/proc/{stack.pid(container)}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert set(fields["Uid"].split()) == {"0" if service in ROOT_SERVICES else "10001"}
        allowed = sum(1 << CAPABILITIES[name] for name in configured.get("cap_add", ()))
        assert int(fields["CapBnd"], 16) == allowed
        assert int(fields["CapEff"], 16) == (allowed if service in ROOT_SERVICES else 0)
        assert fields["NoNewPrivs"] == "1"
        shown = stack.inspect(container)["HostConfig"]
        assert isinstance(shown, dict)
        assert shown["ReadonlyRootfs"] and not shown["Privileged"]


STORE_KEYS = {"/run/secrets/s3_access_key", "/run/secrets/s3_secret_key"}
GIVEN = {
    "nats": {"/etc/nats/keys/server"},
    "shipper": STORE_KEYS | {"/run/keys"},
    "storage": STORE_KEYS,
}


async def test_shipper_and_store_have_nothing_of_the_host(stack: Stack) -> None:
    for service in GIVEN:
        for container in stack.containers(service):
            mounts = stack.inspect(container)["Mounts"]
            assert isinstance(mounts, list)
            binds = {one["Destination"] for one in mounts if one["Type"] == "bind"}
            assert binds == GIVEN[service]


async def test_bus_knows_nobody_without_a_key(stack: Stack) -> None:
    with pytest.raises(CrashbusError):
        async with connect(f"nats://{stack.address('nats')}:4222") as nobody:
            await nobody.stored(Manifest)


async def test_whoever_listens_from_the_host_hears_of_crashes_with_the_consumers_key(
    stack: Stack, bus: Bus
) -> None:
    (container,) = stack.containers("nats")
    address = stack.docker("port", container, "4222/tcp").split()[0]
    seed = str(stack.keys / "consumer" / SEED)
    async with connect(f"nats://{address}", nkeys_seed=seed) as listener:
        assert {one.crash_id for one in await listener.stored(Manifest)} == {
            one.crash_id for one in await bus.stored(Manifest)
        }


async def test_no_secret_is_shown_anywhere(stack: Stack, store: Minio) -> None:
    inspected = [stack.docker("inspect", c) for s in SERVICES for c in stack.containers(s)]
    images = [
        stack.docker("image", "history", "--no-trunc", f"crashbus/{s}:0.1.0")
        for s in SERVICES
        if s != "guard"
    ]
    told = "\n".join([*inspected, *images, stack.logs()])
    assert stack.secret_key not in told
    assert stack.access_key not in told
    for user in USERS:
        assert (stack.keys / user / SEED).read_text().strip() not in told
    for one in store.list_objects("crashes", recursive=True):
        assert not (one.object_name or "").endswith("s3.json")


async def test_core_pattern_is_put_back_when_the_recorder_is_killed_for_good(stack: Stack) -> None:
    """Last of all: a recorder that was killed does not put it back, and down has to."""
    (container,) = stack.containers("recorder")
    assert core_pattern.current().startswith("|")

    stack.docker("kill", "--signal", "KILL", container)  # the engine does not start it again

    await asyncio.to_thread(stack.compose, "stop", "guard")
    await until(lambda: not core_pattern.current().startswith("|"))
