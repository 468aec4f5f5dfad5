"""Crashes in containers of a real engine, which is asked what they are called."""

import asyncio
import http.server
import io
import json
import os
import re
import signal
import socketserver
import subprocess
import tarfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from crashbus.cli import engine as cli_engine
from crashbus.parts import Container
from services.common.capture import CaptureRecord
from services.common.redact import REDACTED
from services.recorder import containers
from tests.support.core_pattern import core_pattern_kept
from tests.support.docker import IMAGE, Engine, child_of
from tests.support.recorder import FILES, RecorderService
from tests.support.requirements import need_program
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def recorder(engine: Engine) -> AsyncIterator[RecorderService]:
    with core_pattern_kept():
        service = RecorderService(
            recorder_runtime_socket=engine.socket, recorder_core_off="label=no.core"
        )
        try:
            await service.start()
            yield service
        finally:
            service.close()


async def crash_in(
    recorder: RecorderService,
    engine: Engine,
    *options: str,
    image: str = IMAGE,
    program: str = "/null_pointer",
) -> tuple[str, CaptureRecord]:
    """Run a container that crashes; return its ID and the record."""
    before = set(recorder.spool.iterdir()) if recorder.spool.exists() else set()
    identifier = await asyncio.to_thread(engine.run, *options, image, program)

    async def found() -> CaptureRecord | None:
        for path in set(recorder.spool.iterdir()) - before:
            record = recorder.record(int(path.name)) if path.name.isdigit() else None
            container = record.process.container if record else None
            if container is not None and container.id == identifier:
                return record
        return None

    return identifier, await until(found, 20)


ALL = [
    (),
    ("--rm",),
    ("--read-only",),
    ("--tmpfs", "/tmp"),
    ("--user", "1234:5678"),
    ("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    ("--memory", "16m"),
    ("--ulimit", "core=0"),
    ("--pid", "host"),
    ("--init",),
]


@pytest.mark.parametrize("options", ALL, ids=lambda one: " ".join(one) or "plain")
async def test_crash_in_a_container_is_captured_whole(
    recorder: RecorderService, engine: Engine, options: tuple[str, ...]
) -> None:
    labels = ("--label", "tier=front", "--label", "db.password=hunter2")

    identifier, record = await crash_in(recorder, engine, *options, *labels)

    pid = record.process.pid
    assert record.signal_name == "SIGSEGV"
    assert len(record.files) == len(FILES)
    assert not any(file.truncated for file in record.files.values())
    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    assert found["threads"][0]["frames"][0]["symbol"] == "crash_here"
    container = record.process.container
    assert container is not None
    assert (container.id, container.runtime, container.image) == (identifier, "docker", IMAGE)
    assert container.name
    assert container.labels == {"tier": "front", "db.password": REDACTED}
    shown = json.loads(recorder.file(pid, "snapshot").read_bytes())["Container"]
    assert shown["Name"] == container.name
    (module,) = record.modules
    assert module.path == "/null_pointer"
    assert module.kept
    if "host" not in options and "--init" not in options:
        assert record.process.ns_pid == 1
    if "--user" in options:
        assert (record.process.uid, record.process.gid) == (1234, 5678)
    if "--rm" not in options:
        changed = engine.docker("diff", identifier).stdout.split(b"\n")
        made = [line for line in changed if line and b"/dev" not in line and b"/etc" not in line]
        by_docker = {b"A /proc", b"A /sys", b"A /tmp", b"A /sbin", b"A /sbin/docker-init"}
        assert set(made) <= by_docker, "something was written inside"


_LIBRARY = """
int in_own_library(volatile int *nothing) {
    return *nothing; /* LINE */
}
"""
_PROGRAM = """
int in_own_library(volatile int *);
int main(void) { return in_own_library(0); }
"""


def dynamic_image(engine: Engine, place: Path) -> str:
    """Make an image with a program, its loader, libc, and a library that only it has."""
    need_program("gcc")
    library, program = place / "libown.so", place / "program"
    (place / "own_library.c").write_text(_LIBRARY)
    (place / "own_program.c").write_text(_PROGRAM)
    compiler = ("gcc", "-g", "-O0", "-Wl,--build-id")
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-Wl,-soname,libown.so", "-o", library, "own_library.c"],
        cwd=place,
        check=True,
    )
    subprocess.run(
        [*compiler, "-o", program, "own_program.c", library, "-Wl,-rpath,/opt/own"],
        cwd=place,
        check=True,
    )
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        tar.add(program, arcname="program")
        tar.add(library, arcname="opt/own/libown.so")
        for path in re.findall(r"\s(/lib\S+) \(0x", listed):
            tar.add(path, arcname=path.lstrip("/"))
    done = engine.docker("import", "-", "dynamic:test", input=archive.getvalue())
    assert done.returncode == 0, done.stderr
    library.unlink()  # as if it had been built elsewhere
    return "dynamic:test"


async def test_library_that_only_the_container_has_gives_names_and_lines(
    recorder: RecorderService, engine: Engine, tmp_path: Path
) -> None:
    image = await asyncio.to_thread(dynamic_image, engine, tmp_path)
    assert not Path("/opt/own").exists()

    _, record = await crash_in(recorder, engine, "--rm", image=image, program="/program")

    found = json.loads(recorder.file(record.process.pid, "backtrace_json").read_bytes())
    inner, outer, *_ = found["threads"][0]["frames"]
    line = _LIBRARY.splitlines().index("    return *nothing; /* LINE */") + 1
    assert inner["symbol"] == "in_own_library"
    assert inner["file"].endswith("own_library.c") and inner["line"] == line
    assert outer["symbol"] == "main" and outer["file"].endswith("own_program.c")
    assert found["modules"][inner["module"]]["path"] == "/opt/own/libown.so"
    (own,) = [one for one in record.modules if one.path == "/opt/own/libown.so"]
    assert own.kept


async def test_label_forbids_a_core(recorder: RecorderService, engine: Engine) -> None:
    _, record = await crash_in(recorder, engine, "--rm", "--label", "no.core=1")

    assert not any(name.startswith("core") for name in record.files)
    assert "no core for label=no.core" in record.notes[0]


async def test_docker_stop_while_it_crashes_leaves_what_was_read(
    recorder: RecorderService, engine: Engine
) -> None:
    done = engine.docker(
        *("run", "--detach", "--rm", "--network", "none", "--name", "victim"),
        *("--init", IMAGE, "/waiting"),
    )
    assert done.returncode == 0, done.stderr
    first = int(engine.docker("inspect", "--format", "{{.State.Pid}}", "victim").stdout)
    pid = await child_of(first, "waiting")

    os.kill(pid, signal.SIGSEGV)
    engine.docker("rm", "--force", "victim")

    record = await recorder.captured(pid)
    assert record.process.container is not None
    assert record.process.container.name == "victim"


class _Runtime(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    answer: tuple[int, bytes] | None = None
    asked = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, _Runtime)
        server.asked += 1
        if server.answer is None:
            threading.Event().wait(60)
            return
        status, body = server.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass

    def address_string(self) -> str:
        return "a UNIX socket"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[_Runtime]:
    path = os.path.relpath(tmp_path / "s")  # a socket's path is bounded
    with _Runtime(path, _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


KNOWN = Container(id="ab" * 32, runtime="docker")
GOOD = {"Id": KNOWN.id, "Name": "/web", "Config": {"Image": "nginx:1", "Labels": {"a": "b"}}}


def ask(server: _Runtime, within: float = 5) -> Container | None:
    address = server.server_address
    assert isinstance(address, str)
    return containers.answered(containers.Runtime(Path(address)).ask(KNOWN), within)


async def test_answer_of_the_runtime(runtime: _Runtime) -> None:
    runtime.answer = 200, json.dumps(GOOD).encode()

    found = await asyncio.to_thread(ask, runtime)

    assert found == KNOWN.model_copy(
        update={"name": "web", "image": "nginx:1", "labels": {"a": "b"}}
    )


@pytest.mark.parametrize(
    "answer",
    [
        (404, b'{"message": "No such container"}'),
        (200, b""),
        (200, b"[" * 100_000),
        (200, b"{}"),
        (200, json.dumps(GOOD | {"Id": "cd" * 32}).encode()),
        (200, json.dumps(GOOD | {"Config": []}).encode()),
        (200, b'{"Id": "' + b"x" * 5_000_000),
        None,
    ],
    ids=["404", "empty", "deep", "nothing", "another", "odd", "endless", "silence"],
)
async def test_what_is_no_answer_leaves_the_container_as_it_is(
    runtime: _Runtime, answer: tuple[int, bytes] | None
) -> None:
    runtime.answer = answer

    assert await asyncio.to_thread(ask, runtime, 0.5) is None


async def test_name_that_no_record_could_hold_is_made_readable() -> None:
    one = Container(id="a" * 64, runtime="docker")

    told = containers.described(one, one.id, "\udcff", "i", {"l": "\ud800"})

    assert (told.name, told.labels) == ("\\udcff", {"l": "\\ud800"})


async def test_container_is_asked_for_once_unless_it_failed(runtime: _Runtime) -> None:
    address = runtime.server_address
    assert isinstance(address, str)
    asking = containers.Runtime(Path(address))
    runtime.answer = 500, b"busy"
    for _ in range(2):
        assert await asyncio.to_thread(containers.answered, asking.ask(KNOWN)) is None
    assert runtime.asked == 2
    runtime.answer = 200, json.dumps(GOOD).encode()

    for _ in range(5):
        assert await asyncio.to_thread(containers.answered, asking.ask(KNOWN)) is not None

    assert runtime.asked == 3


async def test_runtime_that_hangs_is_left_alone_for_a_while(
    runtime: _Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "ANSWER_WITHIN", 0.3)
    address = runtime.server_address
    assert isinstance(address, str)
    asking = containers.Runtime(Path(address))
    first = asking.ask(KNOWN)
    await until(first.done)

    assert asking.ask(KNOWN.model_copy(update={"id": "cd" * 32})).done()

    assert runtime.asked == 1
    monkeypatch.setattr(containers, "_SILENT_FOR", 0.0)
    monkeypatch.setattr(asking, "_silent_until", 0.0)
    runtime.answer = 200, json.dumps(GOOD).encode()
    assert await asyncio.to_thread(containers.answered, asking.ask(KNOWN), 5) is not None


async def test_runtime_that_is_not_there(tmp_path: Path) -> None:
    asking = containers.Runtime(tmp_path / "none")

    assert await asyncio.to_thread(containers.answered, asking.ask(KNOWN)) is None
    assert containers.answered(None) is None


async def test_doctor_asks_the_engine_how_to_start_crashbus(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_engine, "SOCKETS", (engine.socket,))
    (finding,) = cli_engine.findings()
    assert finding.ok
    assert finding.detail.startswith("Docker ")
    assert "docker compose -f compose.yaml" in finding.detail
