"""Debug information from debuginfod servers: a real one, and some that are up to no good."""

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from pydantic import ValidationError

from crashbus import elf
from services.recorder import metrics
from services.recorder.settings import RecorderSettings
from services.recorder.unwinding import debug_files, debuginfod
from services.recorder.unwinding.debug_sources import S3, Sources
from services.recorder.unwinding.debuginfod import Debuginfod
from tests.recorder.conftest import MakeRecorder
from tests.support.crashers import crasher
from tests.support.disk import tmpfs
from tests.support.nats import free_port
from tests.support.packaged import packaged
from tests.support.recorder import RecorderService, crash
from tests.support.requirements import need_program
from tests.support.s3 import S3Server
from tests.support.tcp import make_certificates
from tests.support.wait import until

WITHIN = 30.0  # seconds
MIB = 1024 * 1024


class Server:
    """A debuginfod that serves the files of a directory."""

    def __init__(self, directory: Path) -> None:
        need_program("debuginfod")
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process = subprocess.Popen(
            ["debuginfod", "-F", "-d", ":memory:", "-p", self.url.rpartition(":")[2], directory],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def has(self, build_id: str) -> None:
        def there() -> bool:
            with suppress(URLError, OSError), urlopen(f"{self.url}/buildid/{build_id}/debuginfo"):
                return True
            return False

        await until(there, 60, every=0.1)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def stripped(directory: Path) -> tuple[Path, Path, str]:
    """Return a program without debug information, that information, and its build ID."""
    program = Path(shutil.copy(crasher("null_pointer"), directory / "program"))
    debug = directory / "served" / "program.debug"
    debug.parent.mkdir()
    subprocess.run(["objcopy", "--only-keep-debug", program, debug], check=True)
    subprocess.run(["strip", program], check=True)
    with program.open("rb") as file:
        build_id = elf.build_id(file.fileno())
    assert build_id
    return program, debug, build_id


async def backtrace_of(recorder: RecorderService, program: Path) -> str:
    pid, _ = crash(program)
    record = await recorder.captured(pid)
    assert record.state == "complete"
    return recorder.file(pid, "backtrace").read_text()


async def test_lines_come_from_a_server_that_is_asked_once(
    recorder_with: MakeRecorder, tmp_path: Path, readable_directory: Path
) -> None:
    made = packaged(tmp_path / "served")
    program = Path(shutil.copy(made.program, tmp_path))
    server = Server(made.debug.parent)
    cache = readable_directory / "cache"
    recorder = recorder_with(
        recorder_debuginfod_urls=f"http://127.0.0.1:1 {server.url}",
        recorder_debuginfod_cache=cache,
        recorder_debug_directory=tmp_path / "nothing",
        recorder_debuginfod_deadline=30,
        recorder_backtrace_deadline=60,
    )
    cache.mkdir()
    left = cache / ".download-of-one-that-was-killed"
    left.touch()
    try:
        for build_id in (made.build_id, made.common_id):
            await server.has(build_id)
        await recorder.start()
        assert not left.exists()
        first = await backtrace_of(recorder, program)
    finally:
        server.stop()
    second = await backtrace_of(recorder, program)

    assert "bug.c:" in first
    assert "bug.c:" in second
    for file, build_id in ((made.debug, made.build_id), (made.common, made.common_id)):
        kept = debug_files.path_of(cache, build_id)
        assert kept.read_bytes() == file.read_bytes()
        # It is shipped with the core as well.
        assert list((recorder.spool / "build-id").glob(f"debuginfo_{build_id}_*"))


class Bad:
    """A server that answers any request with these bytes, said to be so many."""

    def __init__(
        self,
        body: bytes,
        length: int | None = None,
        status: int = 200,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.asked = 0
        outer, self.silent = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                self.send_response(status)
                if length is not None:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(body)
                if length is not None and length > len(body):
                    outer.silent.wait(60)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.silent.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def bad(request: pytest.FixtureRequest) -> Iterator[Bad]:
    server = Bad(*request.param)
    yield server
    server.stop()


ANOTHER = Path("/bin/sleep").read_bytes()
BUILD_ID = "00" * 20


def build_id_of(program: Path) -> str:
    with program.open("rb") as file:
        build_id = elf.build_id(file.fileno())
    assert build_id is not None
    return build_id


def fetcher(url: str, cache: Path, within: float = WITHIN, cache_bytes: int = MIB) -> Debuginfod:
    return Debuginfod(Sources((url,)), cache, within, MIB, cache_bytes)


def files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "bad",
    [
        (ANOTHER, len(ANOTHER)),
        (b"no ELF file", 11),
        (b"x" * (MIB + 1), MIB + 1),
        (ANOTHER, len(ANOTHER), 500),
    ],
    indirect=True,
    ids=["another build", "garbage", "too large", "error"],
)
def test_what_is_not_right_is_not_kept(bad: Bad, tmp_path: Path) -> None:
    fetcher(bad.url, tmp_path).fetch([BUILD_ID], WITHIN)

    assert bad.asked == 1
    assert not files(tmp_path)


@pytest.mark.parametrize("trusted", [True, False])
def test_server_is_asked_over_tls_if_its_ca_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    need_program("openssl")
    made = make_certificates(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(made.certificate, made.key)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.ca if trusted else "/dev/null"))
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)  # who fetches is nobody
    server = Bad(ANOTHER, len(ANOTHER), tls=tls)
    build_id = build_id_of(Path("/bin/sleep"))
    try:
        fetcher(server.url, tmp_path / "cache").fetch([build_id], WITHIN)
    finally:
        server.stop()

    assert [one.read_bytes() for one in files(tmp_path / "cache")] == [ANOTHER] * trusted


@pytest.mark.parametrize("bad", [(b"\x7fELF", 1000)], indirect=True)
def test_server_that_falls_silent_is_not_waited_for(bad: Bad, tmp_path: Path) -> None:
    fetcher(bad.url, tmp_path, within=2).fetch([BUILD_ID], WITHIN)

    assert not bad.silent.is_set(), "it was waited for"
    assert not files(tmp_path)


@pytest.mark.parametrize("bad", [(b"", 0, 404)], indirect=True)
def test_server_is_not_asked_again_for_what_it_has_not(bad: Bad, tmp_path: Path) -> None:
    servers = fetcher(bad.url, tmp_path)

    servers.fetch([BUILD_ID], WITHIN)
    servers.fetch([BUILD_ID], WITHIN)

    assert bad.asked == 1


def test_server_that_is_not_there_costs_nothing_but_the_lines(tmp_path: Path) -> None:
    fetcher(f"http://127.0.0.1:{free_port()}", tmp_path).fetch([BUILD_ID], WITHIN)

    assert not files(tmp_path)


_FETCHING = """
import sys
from pathlib import Path
from services.recorder.unwinding.debug_sources import Sources
from services.recorder.unwinding.debuginfod import Debuginfod
Debuginfod(Sources((sys.argv[1],)), Path(sys.argv[2]), 60, 1 << 20, 1 << 20).fetch(["00" * 20], 60)
"""


@pytest.mark.parametrize("bad", [(b"\x7fELF", 1000)], indirect=True)
async def test_what_another_is_fetching_is_left_to_it_until_it_was_killed(
    bad: Bad, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    killed = subprocess.Popen([sys.executable, "-c", _FETCHING, bad.url, str(cache)])
    await until(lambda: bad.asked and files(cache))
    ours = fetcher(bad.url, cache)  # as a snapshot makes one beside the recorder
    assert files(cache)
    killed.kill()
    killed.wait()
    assert files(cache)

    ours.remove_unfinished()

    assert not files(cache)


def of_bucket(s3: S3Server, place: str, *keys: str) -> Sources:
    return Sources((place,), S3(s3.endpoint, "us-east-1", *keys))


def failed() -> float:
    return float(metrics.DEBUGINFO.labels("failed")._value.get())


@pytest.mark.parametrize("bad", [(ANOTHER, len(ANOTHER))], indirect=True)
def test_server_that_speaks_no_http_leaves_it_to_the_next(bad: Bad, tmp_path: Path) -> None:
    build_id = build_id_of(Path("/bin/sleep"))
    with socket.create_server(("127.0.0.1", 0)) as odd:
        threading.Thread(target=_answer_oddly, args=(odd,), daemon=True).start()
        places = (f"http://127.0.0.1:{odd.getsockname()[1]}", bad.url)
        client = Debuginfod(Sources(places), tmp_path, WITHIN, MIB, MIB)
        client.fetch([build_id], WITHIN)

    (kept,) = files(tmp_path)
    assert kept.read_bytes() == ANOTHER


def _answer_oddly(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"SSH-2.0-none\r\n")


def test_place_that_cannot_be_asked_costs_nothing_but_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_a_client(*_: object) -> tuple[str, ...]:
        raise ModuleNotFoundError("No module named 'minio'")

    monkeypatch.setattr(Sources, "urls", without_a_client)
    before = metrics.DEBUGINFO.labels("failed")._value.get()
    client = Debuginfod(Sources(("s3://bucket",)), tmp_path / "cache", WITHIN, MIB, MIB)
    client.fetch(["ab" * 20], WITHIN)
    assert metrics.DEBUGINFO.labels("failed")._value.get() == before + 1
    assert not list((tmp_path / "cache").iterdir())


def test_bucket_has_what_shippers_left_there(s3: S3Server, tmp_path: Path) -> None:
    _, debug, build_id = stripped(tmp_path)
    bucket = s3.make_bucket()
    key = f"hosts/all/build-id/{build_id[:2]}/{build_id[2:]}/debuginfo"
    s3.client().fput_object(bucket, key, str(debug))
    sources = of_bucket(s3, f"s3://{bucket}/hosts/all", s3.access_key, s3.secret_key)
    cache = tmp_path / "cache"

    Debuginfod(sources, cache, WITHIN, MIB, 8 * MIB).fetch([build_id, BUILD_ID], WITHIN)

    assert [path.read_bytes() for path in files(cache)] == [debug.read_bytes()]
    # Whoever takes over the process that fetches finds no key, but what one object is read with.
    urls = sources.urls(build_id)
    assert all(s3.secret_key not in url for url in urls)
    assert urlopen(urls[0]).read() == debug.read_bytes()


def test_bucket_that_refuses_is_counted_and_asked_again(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.make_bucket()
    for keys in ((), (s3.access_key, "wrong")):
        before = failed()
        fetching = Debuginfod(of_bucket(s3, f"s3://{bucket}", *keys), tmp_path, WITHIN, MIB, MIB)

        fetching.fetch([BUILD_ID], WITHIN)
        fetching.fetch([BUILD_ID], WITHIN)

        assert failed() == before + 2
        assert not files(tmp_path)


def test_bucket_that_has_it_not_is_not_asked_again(s3: S3Server, tmp_path: Path) -> None:
    sources = of_bucket(s3, f"s3://{s3.make_bucket()}", s3.access_key, s3.secret_key)
    fetching = Debuginfod(sources, tmp_path, WITHIN, MIB, MIB)
    missing = metrics.DEBUGINFO.labels("missing")._value.get

    before = missing()
    fetching.fetch([BUILD_ID], WITHIN)
    fetching.fetch([BUILD_ID], WITHIN)

    assert missing() == before + 1


@pytest.mark.parametrize("place", ["s3://x", "s3://key:secret@bucket/x", "ftp://server"])
def test_place_that_is_none_is_refused(place: str) -> None:
    with pytest.raises(ValidationError):
        RecorderSettings(debuginfod_urls=place)


def test_worker_s_answer_is_not_taken_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes over the process that fetches cannot fill the recorder's memory."""
    endless = "import sys\nwhile True: sys.stdout.write('[' * 65536)"
    monkeypatch.setattr(debuginfod, "_COMMAND", (sys.executable, "-c", endless))
    before = failed()

    fetcher("http://127.0.0.1:1", tmp_path, within=600).fetch([BUILD_ID], 600)

    assert failed() == before + 1


def test_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    kept = []
    for number in range(4):
        place = tmp_path / ".build-id" / f"{number:02x}" / ("0" * 38 + ".debug")
        place.parent.mkdir(parents=True)
        place.write_bytes(bytes(400))
        os.utime(place, (number, number))
        kept.append(place)
    servers = fetcher(f"http://127.0.0.1:{free_port()}", tmp_path, cache_bytes=800)

    servers.fetch(["00" + "0" * 38, BUILD_ID.replace("0", "f")], WITHIN)

    assert sorted(files(tmp_path)) == [kept[0], kept[3]]


def test_cache_on_a_disk_that_is_read_only_is_used(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "cache", "size=64k") as cache:
        place = debug_files.path_of(cache, BUILD_ID)
        place.parent.mkdir(parents=True)
        place.touch()
        subprocess.run(["mount", "-o", "remount,ro", cache], check=True)

        fetcher(f"http://127.0.0.1:{free_port()}", cache).fetch([BUILD_ID], WITHIN)
