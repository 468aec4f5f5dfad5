"""``crashbus demo``: the main job, seen in seconds: a real nginx crashes and is delivered.

Everything runs for real, on ports and in directories of its own: nats-server, the four
services, nginx. Afterwards only the delivered files are left.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer
import zstandard

from crashbus import Bus, DeadLetter, Manifest, Receipt, SignalEvent, connect, names
from crashbus.cli.errors import Trouble
from crashbus.cli.supervisor import SERVICES, free_port
from crashbus.cli.terminal import console, plain, size, table
from crashbus.errors import BusUnreachable
from crashbus.layout import SHARED, Kind

_START_WITHIN = 30.0  # seconds for all services to be healthy, on a slow machine
_DELIVER_WITHIN = 60.0  # seconds from the crash to the last receipt
_STOP_WITHIN = 20.0  # seconds for `crashbus run` to stop everything it started
_LOOK_AGAIN = 0.02  # seconds between two looks at the bus
_BACKTRACE_LINES = 14


def demo(
    to: Annotated[Path, typer.Option(help="Where the crash files are delivered, and stay.")] = Path(
        "build/demo"
    ),
) -> None:
    """Crash a real nginx with SIGBUS and show what Crashbus makes of it."""
    for program, package in (("nginx", "nginx-light"), ("nats-server", "nats-server")):
        if shutil.which(program, path=_path()) is None:
            raise Trouble(f"{program} is not installed", f"apt-get install {package}")
    if os.geteuid() != 0:
        raise Trouble("eBPF and core_pattern need root", "run it with sudo")
    asyncio.run(_demo(to.absolute()))


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


async def _demo(destination: Path) -> None:
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="crashbus-demo-") as scratch:
        try:
            await _show_main_job(Path(scratch), destination)
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def _show_main_job(scratch: Path, destination: Path) -> None:
    began = time.monotonic()
    _step("starting nats-server and the services: recorder, detector, shipper, collector")
    async with _crashbus(scratch, destination) as url, connect(url) as bus:
        _step(f"all healthy after {time.monotonic() - began:.1f} s")
        async with _nginx(scratch) as master:
            _step(f"nginx serves pages; its master is process {master}: kill -BUS {master}")
            crashed = time.monotonic()
            event, manifest, receipts = await _crash(bus, master)
        _step(f"delivered {time.monotonic() - crashed:.2f} s after the signal, and confirmed")
        _show_event(event)
        _show_files(destination, manifest, receipts)
        _show_backtrace(destination / manifest.folder, manifest)
    console().print(
        f"\nThe files stay in {destination / manifest.folder}\n"
        "Everything else is stopped and cleaned up. On a real host, the same is:\n"
        "  crashbus run --dest s3://bucket/prefix"
    )


def _step(text: str) -> None:
    console().print(f"▸ {plain(text)}", style="bold")


@asynccontextmanager
async def _crashbus(scratch: Path, destination: Path) -> AsyncIterator[str]:
    """Run `crashbus run` and yield the bus's URL once every service is healthy."""
    port, http = free_port(), {name: free_port() for name in SERVICES}
    environment = dict(
        os.environ,
        PATH=_path(),
        CRASHBUS_STATE=str(scratch / "state"),
        CRASHBUS_SPOOL=str(scratch / "appscope"),
        CRASHBUS_RECORDER_SOCKET=str(scratch / "run" / "coredump.sock"),
        **{f"CRASHBUS_{name.upper()}_HTTP": f"127.0.0.1:{http[name]}" for name in SERVICES},
    )
    logs = scratch / "logs"
    arguments = ("--dest", destination.as_uri(), "--port", str(port), "--logs", str(logs))
    with (scratch / "run.log").open("ab") as output:
        running = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "crashbus", "run", *arguments,
            env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        try:
            async with asyncio.timeout(_START_WITHIN):
                await _until_healthy(running, http)
        except (TimeoutError, ChildProcessError) as error:
            raise Trouble(f"not healthy: {error}\n{_tails(scratch)}", "crashbus doctor") from None
        yield f"nats://127.0.0.1:{port}"
    finally:
        await _stop(running)


async def _until_healthy(running: asyncio.subprocess.Process, ports: dict[str, int]) -> None:
    for name, port in ports.items():
        while (fault := await asyncio.to_thread(_fault, port)) is not None:
            if running.returncode is not None:
                raise ChildProcessError(f"crashbus run ended with {running.returncode}")
            await asyncio.sleep(0.05)
        del fault, name


def _fault(port: int) -> str | None:
    """Return what a service says is wrong with it; None when it is healthy."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2):
            return None
    except urllib.error.HTTPError as error:
        return error.read().decode(errors="replace")
    except OSError as error:
        return str(error)


def _tails(scratch: Path) -> str:
    """Return the last lines of all logs."""
    paths = [scratch / "run.log", *sorted((scratch / "logs").glob("*.log"))]
    return "\n".join(
        f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-8:])
        for path in paths
        if path.exists()
    )


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), _STOP_WITHIN)
    except TimeoutError:
        process.kill()
        await process.wait()


@asynccontextmanager
async def _nginx(scratch: Path) -> AsyncIterator[int]:
    """Run nginx on a free port of loopback and yield its master's PID."""
    port, directory = free_port(), scratch / "nginx"
    directory.mkdir()
    (directory / "index.html").write_text("hello\n")
    directory.chmod(0o755)
    scratch.chmod(0o711)  # the workers run as another user
    (directory / "nginx.conf").write_text(
        "daemon off;\nworker_processes 2;\n"
        f"pid {directory}/nginx.pid;\nerror_log {directory}/error.log;\n"
        "events {}\n"
        "http {\n  access_log off;\n"
        + "".join(
            f"  {name}_temp_path {directory}/{name};\n"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        + f"  server {{ listen 127.0.0.1:{port}; root {directory}; }}\n}}\n"
    )
    master = await asyncio.create_subprocess_exec(
        "nginx", "-c", str(directory / "nginx.conf"), "-e", str(directory / "error.log"),
        env={**os.environ, "PATH": _path()}, start_new_session=True,
    )  # fmt: skip
    workers: list[int] = []
    try:
        try:
            async with asyncio.timeout(_START_WITHIN):
                while not await asyncio.to_thread(_serves, port):
                    if master.returncode is not None:
                        raise Trouble(f"nginx ended with {master.returncode}", "nginx -t")
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise Trouble("nginx serves no pages", "nginx -t") from None
        workers = _children(master.pid)
        yield master.pid
    finally:
        if master.returncode is None:
            master.terminate()
            await master.wait()
        # A master that was killed leaves its workers behind.
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _serves(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def _crash(bus: Bus, master: int) -> tuple[SignalEvent, Manifest, list[Receipt]]:
    """Send SIGBUS and return the event, the manifest and the receipts that follow."""
    try:
        async with asyncio.timeout(_DELIVER_WITHIN):
            os.kill(master, signal.SIGBUS)
            event = await _event_of(bus, master)
            crash = f"{names.token(event.host)}.{event.crash_id}"
            receipts = await _receipts_of(bus, crash)
            (manifest, *_) = await bus.stored(Manifest, f"crash.report.{crash}")
    except TimeoutError:
        raise Trouble("the crash was not delivered in time", "crashbus doctor") from None
    except BusUnreachable as error:
        raise Trouble(str(error), "crashbus doctor") from None
    return event, manifest, receipts


async def _event_of(bus: Bus, pid: int) -> SignalEvent:
    while True:
        for event in await bus.stored(SignalEvent):
            if event.process.pid == pid:
                return event
        await asyncio.sleep(_LOOK_AGAIN)


async def _receipts_of(bus: Bus, crash: str) -> list[Receipt]:
    """Return the receipts of a crash once that of manifest.json is there, the last.

    Raises:
        Trouble: a part of it failed.
    """
    while True:
        receipts = await bus.stored(Receipt, f"crash.shipped.{crash}")
        if any(receipt.file.kind is Kind.MANIFEST for receipt in receipts):
            return receipts
        for letter in await bus.stored(DeadLetter, f"crash.failed.{crash}"):
            raise Trouble(letter.error, letter.mend)
        await asyncio.sleep(_LOOK_AGAIN)


def _show_event(event: SignalEvent) -> None:
    out = console()
    out.print(f"\nThe event, as it went over NATS on {plain(event.subject)}:", style="bold")
    out.print(plain(json.dumps(event.model_dump(mode="json"), indent=2), lines=True))


def _show_files(destination: Path, manifest: Manifest, receipts: list[Receipt]) -> None:
    """Show what lies at the destination, hashed again from what is really there."""
    out = console()
    out.print("\nThe delivered files:", style="bold")
    shown = table("file", "size", "stored", "SHA-256 of the content", "")
    for receipt in receipts:
        path = destination / manifest.folder_of(receipt.file) / receipt.file.stored_name
        if _sha256(path) != receipt.file.sha256:
            raise Trouble(f"{path} is not what was captured", "please report this")
        if receipt.file.kind not in SHARED:
            row = (plain(path.name), size(receipt.file.size), size(path.stat().st_size))
            shown.add_row(*row, receipt.file.sha256, "verified")
    out.print(shown)
    binaries = [receipt.file for receipt in receipts if receipt.file.kind in SHARED]
    total = size(sum(file.size for file in binaries))
    out.print(
        f"and below build-id/ {len(binaries)} programs, libraries and their debug information, "
        f"{total}: verified",
        soft_wrap=True,
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as raw:
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        source = reader if path.suffix == ".zst" else raw
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _show_backtrace(folder: Path, manifest: Manifest) -> None:
    out = console()
    out.print("\nThe backtrace:", style="bold")
    for file in manifest.files:
        if file.kind is Kind.BACKTRACE:
            lines = (folder / file.stored_name).read_text(errors="replace").splitlines()
            out.print(plain("\n".join(lines[:_BACKTRACE_LINES]), lines=True))
            if len(lines) > _BACKTRACE_LINES:
                out.print(f"… {len(lines) - _BACKTRACE_LINES} more lines")
