"""``crashbus receive``: what shippers send over TCP becomes the files again."""

import asyncio
import hashlib
import json
import os
import socket
import ssl
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from crashbus import Bus, frames
from crashbus.cli import receive, receiver, sender
from crashbus.cli.receiver import Limits, Receiving, Refused
from crashbus.cli.sender import Sender
from crashbus.frames import BadFrame
from tests.cli.support import Command
from tests.shipper.conftest import (
    MIB,
    Sent,
    dead_letters,
    nothing_left,
    quick,
    receipts_of,
    send,
    shipping,
)
from tests.shipper.conftest import Running as Running
from tests.support.nats import free_port
from tests.support.requirements import need_root
from tests.support.tcp import Certificates, make_certificates
from tests.support.wait import until

__all__ = ["shipping"]  # a fixture, for this module too

ID = "0123456789abcdef"
FOLDER = f"web1/2026-11-22/230719-nginx-{ID}"


@asynccontextmanager
async def receiving(directory: Path, *options: str) -> AsyncIterator[int]:
    """Run the command, storing below a directory; give its port."""
    port = free_port()
    arguments = ("receive", str(directory), "--listen", f"127.0.0.1:{port}", "--keep-free", "1")
    async with Command(*arguments, *options) as command:
        await until(lambda: listens(port))
        try:
            yield port
        finally:
            command.interrupt()
            assert (await command.result()).status == 0


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def files_in(directory: Path) -> dict[str, Path]:
    return {str(one.relative_to(directory)): one for one in directory.rglob("*") if one.is_file()}


def stored_in(directory: Path) -> dict[str, Path]:
    """Return the files that have their names."""
    found = files_in(directory).items()
    return {place: one for place, one in found if not one.name.startswith(".")}


async def sent_crash(bus: Bus) -> Sent:
    sent = await send(
        bus,
        {
            "backtrace_1": b"#0 main + 4\n#1 \xc3\xa9\n",
            "info_1": b"Process name: nginx",
            "cfg_1": b'{"b":1,"a":[1,2]}',
            "core_1": os.urandom(3 * MIB) + bytes(20 * MIB),
        },
    )
    snapshot = {
        "Time": "2026-11-22T23:07:19Z",
        "Hostname": "web1",
        "ProcessName": "nginx",
        "CrashId": sent.crash_id,
    }
    more = await send(bus, {"snapshot_1": json.dumps(snapshot).encode()})
    for chunk in [one async for one in bus.chunks(more.crash_id, "snapshot_1", 1)]:
        await bus.publish_chunk(sent.crash_id, "snapshot_1", chunk)
    contents = {**sent.contents, **more.contents}
    return Sent(sent.crash_id, (*sent.files, *more.files), contents)


@pytest.mark.parametrize("core", ["ndjson", "binary"])
@pytest.mark.parametrize("keep", [False, True])
async def test_crash_arrives_whole_in_one_folder(
    bus: Bus,
    shipping: Running,
    tmp_path: Path,
    core: str,
    keep: bool,
) -> None:
    base = tmp_path / "base"
    async with receiving(base) as port:
        url = f"tcp://127.0.0.1:{port}?core={core}"
        crashes = [await sent_crash(bus) for _ in range(2)]
        async with shipping([url], quick(tcp_keep=keep)):
            for sent in crashes:
                small = [name for name in sent.contents if not name.startswith("core")]
                await bus.publish(sent.item(url, *small))
                await bus.publish(sent.item(url, "core_1"))
            for sent in crashes:
                await receipts_of(bus, sent, len(sent.contents), within=60)
            await nothing_left(bus)
            count = 2 * len(crashes[0].contents)
            await until(lambda: len(stored_in(base)) == count, within=60)

    for sent in crashes:
        folder = base / sent.folder
        stored = (folder / "core_1.zst").read_bytes()
        with zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True) as whole:
            assert whole.read() == sent.contents["core_1"]
        for text in ("backtrace_1", "info_1"):
            assert (folder / text).read_bytes() == sent.contents[text]
        assert json.loads((folder / "cfg_1").read_bytes()) == json.loads(sent.contents["cfg_1"])
    assert len(files_in(base)) == count


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


async def test_only_senders_with_a_certificate_are_heard(
    bus: Bus,
    shipping: Running,
    tmp_path: Path,
    certificates: Certificates,
) -> None:
    server = ("--tls-cert", certificates.certificate, "--tls-key", certificates.key)
    only = ("--client-ca", certificates.ca)
    known = {
        "tcp_write_timeout": 30,  # the receiver is another process, and the machine may be busy
        "tcp_close_timeout": 30,
        "tls_ca_file": certificates.ca,
        "tls_cert_file": certificates.certificate,
        "tls_key_file": certificates.key,
    }
    base = tmp_path / "base"
    async with receiving(base, *map(str, (*server, *only))) as port:
        url = f"tls://127.0.0.1:{port}?core=binary"
        sent = await send(bus, {"core_1": os.urandom(2 * MIB)})
        await bus.publish(sent.item(url))
        async with shipping([url], quick(tls_ca_file=certificates.ca, give_up=0.5)):
            (letter,) = await dead_letters(bus, within=60)
        assert letter.work is not None
        assert files_in(base) == {}

        await bus.publish(sent.item(url))
        for keep in (False, True):
            async with shipping([url], quick(**known, tcp_keep=keep)):
                await receipts_of(bus, sent, 1, within=60)

    assert [*files_in(base)] == [f"{sent.folder}/core_1.zst"]


def chunk(**changes: Any) -> dict[str, Any]:
    body = b"abc"
    fields = {
        "crash_id": ID,
        "folder": FOLDER,
        "chunk": 0,
        "chunks": 1,
        "offset": 0,
        "size": 3,
        "encoding": "identity",
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    return {"core_1": fields | changes}


def end(**changes: Any) -> dict[str, Any]:
    fields = {
        "crash_id": ID,
        "folder": FOLDER,
        "chunks": 1,
        "complete": True,
        "encoding": "identity",
        "size": 3,
        "sha256": hashlib.sha256(b"abc").hexdigest(),
        "truncated": False,
    }
    return {"core_1": fields | changes}


GOOD = frames.binary(chunk(), b"abc") + frames.binary(end(), b"")
HOSTILE = {
    "no JSON": b"GET / HTTP/1.1\r\n\r\n",
    "no line": b"{" * 1000,
    "a list": b"[1]\n",
    "two files": b'{"info_1": [], "cfg_1": []}\n',
    "name of a path": b'{"../info_1": ["x"]}\n',
    "name of another file": b'{"authorized_keys": ["x"]}\n',
    "no magic": b"\xcbXXX" + bytes(8),
    "huge JSON": frames.HEAD.pack(frames.MAGIC, 2**31, 0),
    "huge body": frames.HEAD.pack(frames.MAGIC, 10, 2**31),
    "body cut short": frames.binary(chunk(), b"abc")[:-1],
    "no end": frames.binary(chunk(), b"abc"),
    "end first": frames.binary(end(), b""),
    "second chunk first": frames.binary(chunk(chunk=1), b"abc"),
    "chunk twice": frames.binary(chunk(), b"abc") * 2,
    "wrong offset": frames.binary(chunk(offset=3), b"abc"),
    "wrong size": frames.binary(chunk(size=4), b"abc"),
    "wrong hash": frames.binary(chunk(), b"abd"),
    "wrong end": frames.binary(chunk(), b"abc") + frames.binary(end(sha256="0" * 64), b""),
    "too few": frames.binary(chunk(), b"abc") + frames.binary(end(chunks=2), b""),
    "of another crash": frames.binary(chunk(), b"abc") + frames.binary(end(crash_id=ID[::-1]), b""),
    "no zstd": frames.binary(chunk(encoding="zstd"), b"abc"),
    "no base64": frames.line(chunk(), b"")
    .replace(b"{", b'{"data":"%",', 2)
    .replace(b'{"data":"%",', b"{", 1),
    "bomb": frames.binary(
        chunk(encoding="zstd", sha256=hashlib.sha256(zstandard.compress(bytes(MIB))).hexdigest()),
        zstandard.compress(bytes(MIB)),
    ),
}


def say(port: int, data: bytes) -> bool:
    """Send, and tell whether the receiver ended the connection in order."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.settimeout(60)
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1) == b""
        except OSError:
            return False


async def test_whatever_comes_nothing_wrong_is_stored_and_others_are_heard(tmp_path: Path) -> None:
    base = tmp_path / "base"
    async with receiving(base) as port:
        for name, data in HOSTILE.items():
            assert not await asyncio.to_thread(say, port, data), name
            assert files_in(tmp_path) == {}, name
        assert await asyncio.to_thread(say, port, GOOD)
        assert {*files_in(base)} == {f"{FOLDER}/core_1"}


NO_FOLDERS = (
    *("../../etc", "/etc", "x", "", f"a/../{FOLDER}", FOLDER.replace("a", "b")),
    *(f"../2026-11-22/230719-nginx-{ID}", f"../{FOLDER}"),
)


async def test_folder_that_is_no_crashs_is_not_believed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    async with receiving(base) as port:
        for folder in NO_FOLDERS:
            data = frames.line(chunk(folder=folder), b"abc") + frames.line(end(), b"")
            assert await asyncio.to_thread(say, port, data), folder
            assert [*files_in(tmp_path)] == [f"base/{ID}/core_1"], folder


async def test_more_senders_than_are_wanted_are_sent_away(tmp_path: Path) -> None:
    async with receiving(tmp_path, "--connections", "1") as port:
        await until(lambda: asyncio.to_thread(say, port, GOOD))  # whoever was there has gone
        with socket.create_connection(("127.0.0.1", port), 30) as idle:
            idle.sendall(b"{")
            assert not await asyncio.to_thread(say, port, GOOD)
        await until(lambda: asyncio.to_thread(say, port, GOOD))


async def test_who_has_nothing_to_say_makes_room_for_others(tmp_path: Path) -> None:
    async with receiving(tmp_path, "--connections", "1") as port:
        with socket.create_connection(("127.0.0.1", port), 30) as silent:
            await until(lambda: asyncio.to_thread(say, port, GOOD), within=30)
            assert await asyncio.to_thread(silent.recv, 1) == b""


@pytest.mark.parametrize("over_tls", [False, True])
def test_who_only_holds_a_place_makes_room_for_others(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, over_tls: bool
) -> None:
    context = receive._tls(certificates.certificate, certificates.key, None) if over_tls else None
    receiver = receive._Receiver(tmp_path, Limits(), context, 1)
    assert receiver._has_room()
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"" if over_tls else b"{")
        receiver._serve(ours, "peer")
        assert not receiver._has_room()  # it has just come
        monkeypatch.setattr(receive, "_SPEAKS_WITHIN", 0.0)
        assert receiver._has_room()


def test_who_sends_a_long_frame_over_a_slow_link_keeps_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "_SPEAKS_WITHIN", 0.0)
    receiver = receive._Receiver(tmp_path, Limits(), None, 1)
    assert receiver._has_room()
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(30)
        receiver._serve(ours, "peer")
        theirs.sendall(b"{" + b" " * 8 * 1024 * 1024)
        assert not receiver._has_room()


def test_what_was_sent_before_it_was_hung_up_on_is_taken(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    sender = Sender(ours, None, Receiving(tmp_path, "peer", Limits(), lambda _: None))
    with theirs:
        theirs.sendall(GOOD)
        sender.hang_up()
        sender.serve()
    assert {*stored_in(tmp_path)} == {f"{FOLDER}/core_1"}


WITHOUT_IPV6 = """
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
ip link set lo up
printf '127.0.0.1 both\n::1 both\n' >"$0"
mount --bind "$0" /etc/hosts
exec "$@"
"""
LISTENING = "from crashbus.cli import receive; print(len(receive._listening('both', 0)))"


def test_an_address_that_this_host_lacks_is_passed_over_where_there_is_another(
    tmp_path: Path,
) -> None:
    need_root()
    shell = ("unshare", "--net", "--mount", "sh", "-ec", WITHOUT_IPV6, str(tmp_path / "hosts"))
    done = subprocess.run([*shell, sys.executable, "-c", LISTENING], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("sent", [b"{", frames.MAGIC, GOOD[: frames.HEAD.size + 1]])
def test_frame_that_never_comes_whole_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(sender, "_WHOLE", 0.05)
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(sent)
        Sender(ours, None, Receiving(tmp_path, "peer", Limits(), lambda _: None)).serve()
        assert ours.fileno() == -1
    assert files_in(tmp_path) == {}


async def test_tls_is_not_ended_before_all_is_stored(
    tmp_path: Path, certificates: Certificates
) -> None:
    """Here it cannot be, for the disk is to keep more free than it has."""
    context = ssl.create_default_context(cafile=certificates.ca)

    def ends_in_order(port: int) -> bool:
        with (
            socket.create_connection(("127.0.0.1", port), 30) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            connection.sendall(b'{"info_1":["a"]}\n')
            try:
                connection.unwrap()
            except OSError:
                return False
            return True

    server = ("--tls-cert", str(certificates.certificate), "--tls-key", str(certificates.key))
    for room, ended in (("0", True), (str(2**40), False)):
        async with receiving(tmp_path / room, *server, "--keep-free", room) as port:
            assert await asyncio.to_thread(ends_in_order, port) is ended


async def test_small_files_that_say_not_whose_they_are_get_a_folder_by_set(tmp_path: Path) -> None:
    async with receiving(tmp_path) as port:
        data = b'{"info_1":["a",""]}\n{"cfg_1":{}}\n{"info_2":["b"]}\n'
        assert await asyncio.to_thread(say, port, data)

    found = files_in(tmp_path)
    assert all(path.startswith("unnamed/") for path in found)
    assert sorted(one.name for one in found.values()) == ["cfg_1", "info_1", "info_2"]
    assert len({one.parent for one in found.values()}) == 2
    (info,) = (one for one in found.values() if one.name == "info_1")
    assert info.read_bytes() == b"a\n"


@pytest.mark.parametrize("option", [("--keep-free", str(2**40)), ("--max-file", "1")])
async def test_what_there_is_no_room_for_is_refused(
    tmp_path: Path, option: tuple[str, str]
) -> None:
    body = os.urandom(2 * MIB)
    data = frames.binary(chunk(size=len(body), sha256=hashlib.sha256(body).hexdigest()), body)
    async with receiving(tmp_path, *option) as port:
        assert not await asyncio.to_thread(say, port, data)
        assert files_in(tmp_path) == {}


DEEP = 150  # levels, each a space before every number


def test_what_grows_by_its_indentation_is_refused_before_it_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "MAX_SMALL", MIB)
    numbers = b"1," * 100_000 + b"1"  # 15 MB, once they are indented
    line = b'{"snapshot_1": ' + b"[" * DEEP + numbers + b"]" * DEEP + b"}\n"
    receiving = Receiving(tmp_path, "peer", Limits(), lambda _: None)
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="more than"):
            receiving.line(line)
        assert tracemalloc.get_traced_memory()[1] < 6 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--listen", "nowhere"), "no port"),
        (("--tls-key", "/nothing"), "--tls-cert"),
        (("--tls-cert", "/nothing"), "PEM"),
        (("--listen", "192.0.2.1:1"), "another address"),
    ],
)
async def test_wrong_use_is_told_with_the_mend(
    tmp_path: Path, options: tuple[str, ...], word: str
) -> None:
    async with Command("receive", str(tmp_path), *options) as command:
        done = await command.result()
    assert done.status == 1
    assert word in done.err


@given(st.binary(max_size=10_000))
def test_any_chunk_comes_back_from_either_form(body: bytes) -> None:
    told = chunk(size=len(body), sha256=hashlib.sha256(body).hexdigest())
    line = frames.read(frames.line(told, body))
    packed = frames.binary(told, body)
    text, length = frames.lengths(packed[: frames.HEAD.size])
    behind = packed[frames.HEAD.size :]
    binary = frames.read(behind[:text], behind[text : text + length])

    assert line.body == binary.body == body
    assert (line.folder, binary.folder) == (FOLDER, FOLDER)
    assert len(behind) == text + length


@given(st.binary(max_size=300), st.binary(max_size=12, min_size=12))
def test_anything_else_is_a_bad_frame(text: bytes, head: bytes) -> None:
    with pytest.raises(BadFrame):
        frames.read(text)
    if head[:4] != frames.MAGIC:
        with pytest.raises(BadFrame):
            frames.lengths(head)
