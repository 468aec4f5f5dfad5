"""The whole pipeline: all services, a real bus, and one destination of each kind."""

import asyncio
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest_asyncio

from crashbus import Bus, DeadLetter, Manifest, Receipt, SignalEvent, connect, layout
from crashbus.parts import CrashFile
from tests.support.core_pattern import core_pattern_kept
from tests.support.nats import SecuredNats
from tests.support.requirements import need_btf, need_program, need_root
from tests.support.s3 import S3Server
from tests.support.service import ServiceProcess
from tests.support.tcp import Receiver
from tests.support.units import confined
from tests.support.wait import until

HOST = "test-host"
SERVICES = ("recorder", "detector", "shipper", "collector")


@dataclass
class Pipeline:
    bus: Bus
    nats: SecuredNats
    services: dict[str, ServiceProcess]
    spool: Path
    directory: Path
    receiver: Receiver
    core_receiver: Receiver
    s3: S3Server
    bucket: str

    @property
    def destinations(self) -> tuple[str, ...]:
        return (
            f"s3://{self.bucket}/crashes",
            self.receiver.url,
            f"file://{self.directory}",
            f"{self.core_receiver.url}?core=true",
        )

    async def manifest_of(self, pid: int, files: int = 6, within: float = 40) -> Manifest:
        """Return the manifest of a process's crash once it names so many files."""

        return await self._manifest(lambda one: one.process.pid == pid, files, within)

    async def manifest_of_crash(self, crash_id: str) -> Manifest:
        """Return the manifest of a crash once it names all that a crash has."""
        return await self._manifest(lambda one: one.crash_id == crash_id, 6, 40)

    async def _manifest(
        self, is_it: Callable[[Manifest], bool], files: int, within: float
    ) -> Manifest:
        async def look() -> Manifest | None:
            for manifest in reversed(await self.bus.stored(Manifest)):
                if is_it(manifest) and len(manifest.files) >= files:
                    return manifest
            return None

        try:
            return await until(look, within, every=0.1)
        except TimeoutError:
            raise TimeoutError(self.logs()) from None

    async def delivered(self, manifest: Manifest, within: float = 40) -> list[Receipt]:
        """Return the receipts of a crash once each destination has all it wants."""
        names = {file.name for file in manifest.files}
        small = {file.name for file in manifest.files if file.kind not in layout.LARGE}
        not_shared = {file.name for file in manifest.files if file.kind not in layout.SHARED}
        wanted = {
            self.destinations[0]: names | {layout.MANIFEST_NAME},
            self.destinations[1]: small,
            self.destinations[2]: names | {layout.MANIFEST_NAME},
            self.destinations[3]: not_shared,
        }

        async def look() -> list[Receipt] | None:
            subject = f"crash.shipped.{HOST}.{manifest.crash_id}"
            receipts = await self.bus.stored(Receipt, subject)
            got: dict[str, set[str]] = {}
            for receipt in receipts:
                got.setdefault(receipt.destination, set()).add(receipt.file.name)
            return receipts if all(w <= got.get(d, set()) for d, w in wanted.items()) else None

        try:
            return await until(look, within, every=0.1)
        except TimeoutError:
            failed = await self.bus.stored(DeadLetter)
            raise TimeoutError(f"{failed}\n{self.logs()}") from None

    async def events_of(self, pid: int) -> list[SignalEvent]:
        events = await self.bus.stored(SignalEvent)
        return [event for event in events if event.process.pid == pid]

    def stored(self, manifest: Manifest, file: CrashFile) -> dict[str, bytes]:
        """Return what lies at S3 and in the directory, as it is stored."""
        place = f"{manifest.folder_of(file)}/{file.stored_name}"
        return {
            "s3": self.s3.read(self.bucket, f"crashes/{place}"),
            "file": (self.directory / place).read_bytes(),
        }

    def logs(self) -> str:
        return "\n".join(f"--- {s.name}\n{s.log[-3000:]}" for s in self.services.values())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(s3_session: S3Server) -> AsyncIterator[Pipeline]:
    """Everything, running, confined and on a secured bus; the tests of a module share it."""
    need_root()
    need_btf()
    need_program("nats-server")
    s3_session.ensure_gateway()
    with ExitStack() as stack:
        stack.enter_context(core_pattern_kept())
        # A socket's path is bounded, so not below pytest's own long directories.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cb-", dir="/tmp")))
        scratch.chmod(0o755)
        nats = SecuredNats(scratch)
        nats.start()
        stack.callback(nats.stop)
        receiver = Receiver()
        stack.callback(receiver.close)
        core_receiver = Receiver()
        stack.callback(core_receiver.close)
        made = Pipeline(
            bus=None,  # type: ignore[arg-type]
            nats=nats,
            services={},
            spool=scratch / "appscope",
            directory=scratch / "delivered",
            receiver=receiver,
            core_receiver=core_receiver,
            s3=s3_session,
            bucket=s3_session.make_bucket(),
        )
        made.directory.mkdir()
        environment = {
            "CRASHBUS_HOST": HOST,
            "CRASHBUS_STATE": str(scratch / "state"),
            "CRASHBUS_SPOOL": str(made.spool),
            "CRASHBUS_DESTINATIONS": ",".join(made.destinations),
            "CRASHBUS_RECORDER_SOCKET": str(scratch / "run" / "s"),
            **s3_session.settings(),
        }
        made.services = {
            name: ServiceProcess(
                name, scratch, {**environment, **nats.settings(name)}, confined(name)
            )
            for name in SERVICES
        }
        async with connect(**nats.options("operator")) as made.bus:
            try:
                await asyncio.gather(*(service.start() for service in made.services.values()))
                await asyncio.gather(*(s.healthy(30) for s in made.services.values()))
                yield made
            finally:
                await asyncio.gather(*(service.stop() for service in made.services.values()))
        refused = [line for line in nats.log.splitlines() if "Permissions Violation" in line]
        assert not refused, "a service needs what deploy/nats/nats.conf does not allow it"


def top_frames(executable: Path | str, core: Path) -> str:
    """Return what gdb shows of a core's crashing thread."""
    need_program("gdb")
    command = ["gdb", "-nx", "-batch", "-ex", "bt 5", str(executable), str(core)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr
