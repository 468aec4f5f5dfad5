"""``crashbus run`` and ``crashbus demo``: everything on one host, and nothing left behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from crashbus import Manifest, Receipt, connect
from crashbus.layout import SHARED, Kind
from tests.support import core_pattern
from tests.support.core_pattern import core_pattern_kept
from tests.support.crashers import crasher
from tests.support.nats import free_port
from tests.support.requirements import need_btf, need_program, need_root
from tests.support.wait import until

COMMAND = (sys.executable, "-m", "crashbus")
SERVICES = ("recorder", "detector", "shipper", "collector")


@pytest.fixture(autouse=True)
def pattern() -> Iterator[str]:
    """The host's core_pattern, which each test must find again at its end."""
    need_root()
    need_btf()
    need_program("nats-server")
    with core_pattern_kept():
        before = core_pattern.current()
        yield before
        assert core_pattern.current() == before


def processes_of(mark: str) -> list[int]:
    """Return the processes that have `mark` in their arguments or environment."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            text = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in text and int(proc.name) != os.getpid():
            found.append(int(proc.name))
    return found


async def started(*arguments: str | Path, **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND,
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **environment},
    )


async def test_demo_shows_the_main_job_and_leaves_only_the_files(tmp_path: Path) -> None:
    demo = await started("demo", "--to", tmp_path / "out", DEMO_MARK=str(tmp_path))
    output, _ = await asyncio.wait_for(demo.communicate(), 90)
    text = output.decode()
    assert demo.returncode == 0, text
    assert "crash.signal." in text and '"signal_name": "SIGBUS"' in text
    assert text.count("verified") == 8
    assert "ngx_master_process_cycle" in text
    (manifest,) = (tmp_path / "out").rglob("manifest.json")
    files = Manifest.model_validate_json(manifest.read_bytes()).files
    names = {file.stored_name for file in files if file.kind not in SHARED}
    binaries = {file.stored_name for file in files if file.kind in SHARED}
    assert {path.name for path in (tmp_path / "out" / "build-id").rglob("*") if path.is_file()} == (
        binaries
    )
    assert {path.name for path in manifest.parent.iterdir()} == names | {"manifest.json"}
    assert await until(lambda: not processes_of(str(tmp_path)))


@pytest.mark.parametrize("moment", ["starting", "all healthy", "kill -BUS"])
async def test_demo_interrupted_cleans_up(tmp_path: Path, moment: str) -> None:
    demo = await started("demo", "--to", tmp_path / "out", DEMO_MARK=str(tmp_path))
    assert demo.stdout is not None
    async with asyncio.timeout(60):
        async for line in demo.stdout:
            if moment.encode() in line:
                break
    demo.send_signal(signal.SIGINT)
    await asyncio.wait_for(demo.communicate(), 60)
    assert demo.returncode == 130
    assert await until(lambda: not processes_of(str(tmp_path)))


async def test_demo_that_fails_says_why_and_cleans_up(tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "nginx"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    path = f"{broken.parent}:{os.environ['PATH']}"
    demo = await started("demo", "--to", tmp_path / "out", PATH=path, DEMO_MARK=str(tmp_path))
    output, _ = await asyncio.wait_for(demo.communicate(), 60)
    assert demo.returncode == 1
    assert b"nginx ended with 3; nginx -t" in output
    assert b"Traceback" not in output
    assert await until(lambda: not processes_of(str(tmp_path)))


class Running:
    """A ``crashbus run`` with everything of its own."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.out = scratch / "out"
        self.port = free_port()
        self.environment = {
            "CRASHBUS_STATE": str(scratch / "state"),
            "CRASHBUS_SPOOL": str(scratch / "appscope"),
            "CRASHBUS_RECORDER_SOCKET": str(scratch / "run" / "s"),
            **{f"CRASHBUS_{s.upper()}_HTTP": f"127.0.0.1:{free_port()}" for s in SERVICES},
            # Of another bus, as on a host whose units are given one.
            "CRASHBUS_NATS_CA_FILE": "/etc/ssl/certs/ca-certificates.crt",
            "CRASHBUS_NATS_REPLICAS": "3",
        }

    async def start(self) -> None:
        arguments = ("--dest", self.out.as_uri(), "--port", self.port, "--logs", self.scratch)
        self.process = await asyncio.create_subprocess_exec(
            *COMMAND, "run", *map(str, arguments), env={**os.environ, **self.environment}
        )
        await until(lambda: all(self.ready(name) for name in SERVICES), within=60)

    def ready(self, name: str, times: int = 1) -> bool:
        log = self.scratch / f"{name}.log"
        return log.exists() and log.read_text().count(" ready ") >= times

    def service(self, name: str) -> int:
        (pid,) = set(processes_of(f"services.{name}\0")) & set(processes_of(str(self.scratch)))
        return pid

    async def crash_and_deliver(self) -> None:
        process = subprocess.Popen([crasher("null_pointer")])
        await asyncio.to_thread(process.wait)
        async with connect(f"nats://127.0.0.1:{self.port}") as bus:

            async def delivered() -> bool:
                mine = {
                    m.crash_id for m in await bus.stored(Manifest) if m.process.pid == process.pid
                }
                done = await bus.stored(Receipt)
                return any(r.crash_id in mine and r.file.kind is Kind.MANIFEST for r in done)

            await until(delivered, within=60, every=0.1)


@pytest.fixture
async def running(pattern: str) -> AsyncIterator[Running]:
    with tempfile.TemporaryDirectory(prefix="cb-", dir="/tmp") as scratch:
        made = Running(Path(scratch))
        try:
            await made.start()
            yield made
        finally:
            if made.process.returncode is None:
                made.process.terminate()
            await asyncio.wait_for(made.process.wait(), 60)
        assert await until(lambda: not processes_of(scratch))


async def test_run_delivers_and_stops_in_order(running: Running) -> None:
    await running.crash_and_deliver()
    running.process.terminate()
    assert await asyncio.wait_for(running.process.wait(), 60) == 0


@pytest.mark.parametrize("name", SERVICES)
async def test_run_starts_a_killed_service_again(running: Running, name: str) -> None:
    os.kill(running.service(name), signal.SIGKILL)
    await until(lambda: running.ready(name, times=2), within=60)
    await running.crash_and_deliver()


async def test_run_that_stops_while_its_recorder_is_dead_puts_core_pattern_back(
    running: Running, pattern: str
) -> None:
    os.kill(running.service("recorder"), signal.SIGKILL)
    await until(lambda: core_pattern.current().startswith("|"))

    running.process.terminate()

    assert await asyncio.wait_for(running.process.wait(), 60) == 0
    assert core_pattern.current() == pattern


async def test_killed_run_takes_all_it_started_with_it(running: Running) -> None:
    running.process.kill()
    await running.process.wait()
    assert await until(lambda: not processes_of(str(running.scratch)), within=60)


async def test_run_without_a_destination_says_what_to_give() -> None:
    run = await started("run", CRASHBUS_DESTINATIONS="")
    output, _ = await asyncio.wait_for(run.communicate(), 60)
    assert run.returncode == 2
    assert b"--dest file:///var/crashes" in output


async def test_run_whose_logs_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ("--dest", tmp_path.as_uri(), "--port", str(free_port()))
    run = await started("run", *arguments, "--logs", tmp_path / "file" / "logs")
    output, _ = await asyncio.wait_for(run.communicate(), 60)
    assert run.returncode == 2
    assert output.endswith(b"/file/logs: Not a directory; give --logs another directory\n"), output


async def test_run_whose_state_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ("--dest", tmp_path.as_uri(), "--port", str(free_port()))
    run = await started("run", *arguments, CRASHBUS_STATE=str(tmp_path / "file"))
    output, _ = await asyncio.wait_for(run.communicate(), 60)
    assert run.returncode == 1
    assert b"/nats/nats.conf: Not a directory; make room" in output
    assert b"Traceback" not in output


async def test_run_on_a_taken_port_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = await started("run", "--dest", tmp_path.as_uri(), "--port", port)
        output, _ = await asyncio.wait_for(run.communicate(), 60)
    assert run.returncode == 2
    assert f"port {port}".encode() in output and b"--no-nats" in output


async def test_run_stops_at_once_while_the_bus_is_still_starting(tmp_path: Path) -> None:
    slow = tmp_path / "bin" / "nats-server"
    slow.parent.mkdir()
    slow.write_text(f"#!/bin/sh\ntouch {tmp_path}/began\nexec sleep 600\n")
    slow.chmod(0o755)
    run = await started(
        *("run", "--dest", tmp_path.as_uri(), "--port", str(free_port())),
        PATH=f"{slow.parent}:{os.environ['PATH']}",
        CRASHBUS_STATE=str(tmp_path),
    )
    await until((tmp_path / "began").exists)
    run.terminate()
    output, _ = await asyncio.wait_for(run.communicate(), 60)
    assert run.returncode == 0, output
    assert await until(lambda: not processes_of(str(tmp_path)))


async def test_demo_leaves_what_was_in_its_directory(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("earlier crashes")
    demo = await started("demo", "--to", tmp_path)
    await asyncio.wait_for(demo.communicate(), 90)
    assert (tmp_path / "kept").read_text() == "earlier crashes"


async def test_run_with_a_wrong_setting_ends_with_its_name(tmp_path: Path) -> None:
    environment = {
        "CRASHBUS_STATE": str(tmp_path),
        "CRASHBUS_COLLECTOR_COMPRESSION": "much",
        "CRASHBUS_RECORDER_SOCKET": "/run/crashbus-test/s",
        **{f"CRASHBUS_{s.upper()}_HTTP": "" for s in SERVICES},
    }
    run = await started(
        "run", "--dest", tmp_path.as_uri(), "--port", str(free_port()), **environment
    )
    output, _ = await asyncio.wait_for(run.communicate(), 60)
    assert run.returncode == 2
    assert b"CRASHBUS_COLLECTOR_COMPRESSION" in output
    assert b"Traceback" not in output
