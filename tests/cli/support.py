"""Crashes as the services would leave them, and the command line as a process of its own."""

import asyncio
import hashlib
import io
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crashbus import (
    Bus,
    DeadLetter,
    Manifest,
    Postponed,
    Receipt,
    Replay,
    SignalEvent,
    crash_id,
)
from crashbus.chunks import Encoder
from crashbus.layout import Kind, crash_file_name
from crashbus.messages import WorkItem
from crashbus.parts import Binary, CrashFile, Process

BOOT = "6b0f7d52-2b6c-4c0e-9d3b-6d3f6a2d5f10"
EPOCH = 1795388839
HOST = "web.1"
NO_BUS = {"CRASHBUS_NATS_URL": "nats://127.0.0.1:1"}
BACKTRACE = b"backtrace info: signal 11 errno 0 fault address 0x0, reason of fault:\n#0 main + 4\n"


@dataclass
class MadeCrash:
    """A crash with the bytes of its files, by file name."""

    manifest: Manifest
    contents: dict[str, bytes]
    stored: dict[str, bytes] = field(repr=False)

    @property
    def id(self) -> str:
        return self.manifest.crash_id

    @property
    def event(self) -> SignalEvent:
        manifest = self.manifest
        return SignalEvent(
            host=manifest.host,
            time=manifest.crashed_at,
            crash_id=manifest.crash_id,
            event_id=f"{manifest.crash_id}-1",
            monotonic_ns=1,
            process=manifest.process,
            tid=manifest.process.pid,
            signal=11,
            signal_name="SIGSEGV",
            code=1,
            code_meaning="address not mapped to object",
            fault_address=0,
            disposition="default",
        )

    def file(self, kind: Kind) -> CrashFile:
        return next(one for one in self.manifest.files if one.kind is kind)

    def receipts(self) -> list[Receipt]:
        manifest = self.manifest
        return [
            Receipt(
                host=manifest.host,
                crash_id=manifest.crash_id,
                file=file,
                destination=url,
                url=f"{url}/{manifest.folder}/{file.stored_name}",
                attempts=1,
                shipper="test",
            )
            for url in manifest.destinations
            for file in manifest.files
        ]

    def failure(self, error: str = "no such bucket") -> DeadLetter:
        manifest = self.manifest
        return DeadLetter(
            host=manifest.host,
            crash_id=manifest.crash_id,
            service="shipper",
            reason="no_such_bucket",
            error=error,
            mend="make the bucket",
            work=WorkItem(
                host=manifest.host,
                crash_id=manifest.crash_id,
                crashed_at=manifest.crashed_at,
                process_name=manifest.process_name,
                destination=manifest.destinations[0],
                files=manifest.files[:1],
            ),
        )

    def postponed(self) -> Postponed:
        manifest = self.manifest
        return Postponed(
            host=manifest.host,
            crash_id=manifest.crash_id,
            destination=manifest.destinations[0],
            files=(manifest.files[0].name,),
            reason="refused",
            error="nobody listens",
            mend="start the receiver",
            attempts=3,
            next_try=EPOCH + 60,
            given_up=EPOCH + 86400,
        )

    def replay(self) -> Replay:
        manifest = self.manifest
        return Replay(
            host=manifest.host,
            crash_id=manifest.crash_id,
            destination=manifest.destinations[0],
            files=(manifest.files[0].name,),
            failed_at=EPOCH,
        )

    def deliver(self, directory: Path) -> Path:
        """Write what a shipper would; return the crash's folder."""
        folder = directory / self.manifest.folder
        folder.mkdir(parents=True)
        for file in self.manifest.files:
            (folder / file.stored_name).write_bytes(self.stored[file.name])
        (folder / "manifest.json").write_text(self.manifest.model_dump_json(indent=1))
        return folder

    async def publish(self, bus: Bus, *, receipts: bool = True) -> None:
        await bus.publish(self.event)
        await bus.publish(self.manifest)
        for receipt in self.receipts() if receipts else []:
            await bus.publish(receipt)


def make(
    pid: int = 4711,
    *,
    destinations: tuple[str, ...] = (),
    core: bytes = b"\x7fELF" + bytes(3_000_000) + b"end",
    name: str = "nginx",
    host: str = HOST,
    crashed_at: float = EPOCH + 0.5,
    executable: str = "/usr/sbin/nginx",
    backtrace: bytes = BACKTRACE,
) -> MadeCrash:
    """Make a crash with a small file as it is, and a core dump in several zstd frames."""
    contents = {
        crash_file_name(Kind.INFO, EPOCH): b"Process name: nginx\n",
        crash_file_name(Kind.BACKTRACE, EPOCH): backtrace,
        crash_file_name(Kind.CORE, EPOCH): core,
    }
    files, stored = [], {}
    for kind, (file_name, data) in zip(
        (Kind.INFO, Kind.BACKTRACE, Kind.CORE), contents.items(), strict=True
    ):
        encoder = Encoder(1_000_000, "zstd" if kind is Kind.CORE else "identity")
        stored[file_name] = b"".join(chunk.body for chunk in encoder.chunks(io.BytesIO(data)))
        files.append(
            CrashFile(
                name=file_name,
                kind=kind,
                size=encoder.size,
                sha256=encoder.sha256,
                encoding="zstd" if kind is Kind.CORE else "identity",
                stored_size=encoder.stored_size,
                chunks=encoder.count,
            )
        )
    manifest = Manifest(
        host=host,
        crash_id=crash_id(BOOT, pid, 100),
        crashed_at=crashed_at,
        process_name=name,
        process=Process(
            boot_id=BOOT,
            pid=pid,
            ns_pid=pid,
            start_ticks=100,
            uid=0,
            gid=0,
            comm=name,
            executable=executable,
            command_line=(name, "-g", "daemon off;"),
        ),
        signal=11,
        signal_name="SIGSEGV",
        code=1,
        code_meaning="address not mapped to object",
        fault_address=0,
        files=tuple(files),
        destinations=destinations,
    )
    return MadeCrash(manifest, contents, stored)


@dataclass(frozen=True)
class Result:
    """What a command did."""

    status: int
    out: str
    err: str


class Command:
    """A ``crashbus`` command as a process."""

    def __init__(
        self, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CRASHBUS_")}
        self._arguments = [sys.executable, "-m", "crashbus", *arguments]
        self._environment, self._directory = {**clean, **(env or {})}, cwd
        self.out = bytearray()

    async def __aenter__(self) -> "Command":
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments,
            env=self._environment,
            cwd=self._directory,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._reading.cancel()

    async def _read(self) -> None:
        assert self._process.stdout
        while block := await self._process.stdout.read(65536):
            self.out += block

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    async def result(self, within: float = 60) -> Result:
        """Wait until it ends."""
        assert self._process.stderr
        async with asyncio.timeout(within):
            error = await self._process.stderr.read()
            await self._reading
            status = await self._process.wait()
        return Result(status, self.out.decode(), error.decode())


async def crashbus(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Result:
    """Run a command to its end."""
    async with Command(*arguments, env=env, cwd=cwd) as command:
        return await command.result()


def binary_of(content: bytes, kind: Kind = Kind.EXECUTABLE) -> Binary:
    digest = hashlib.sha256(content).hexdigest()
    return Binary(kind=kind, size=len(content), sha256=digest)


async def get(directory: Path, *arguments: str, cwd: Path) -> Result:
    """Run crashbus get on a directory that is a destination, without a bus."""
    return await crashbus("get", *arguments, "--from", directory.as_uri(), env=NO_BUS, cwd=cwd)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
