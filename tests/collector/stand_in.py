"""A shipper for the collector's tests: takes work items and puts the files together again.

The real one is tested with real destinations; here what matters is what the collector puts
on the bus and how it takes receipts.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from crashbus import Bus, DeadLetter, Receipt, SignalEvent, WorkItem, crash_id, identity
from crashbus.chunks import Verifier
from crashbus.errors import DamagedFile
from crashbus.layout import Kind, crash_file_name
from crashbus.parts import Process
from services.common.capture import CapturedFile
from tests.support.records import EPOCH, Writing, process
from tests.support.wait import until


@dataclass
class StandInShipper:
    """Delivers into memory: (destination, folder/name) to content."""

    bus: Bus
    delivered: dict[tuple[str, str], bytes] = field(default_factory=dict)
    order: list[tuple[str, str]] = field(default_factory=list)
    items: list[WorkItem] = field(default_factory=list)
    reason: str = "damaged_file"  # told when a file's chunks are not as announced

    async def run(self) -> None:
        async for delivery in self.bus.consume(WorkItem, "shippers", service="shipper"):
            try:
                await self.ship(delivery.message)
            except DamagedFile as error:
                await self.give_up(delivery.message, str(error))
            await delivery.ack()

    async def give_up(self, item: WorkItem, error: str) -> None:
        letter = DeadLetter(
            host=item.host,
            crash_id=item.crash_id,
            service="shipper",
            reason=self.reason,
            error=error,
            mend="publish it again",
            work=item,
        )
        await self.bus.publish(letter)

    async def ship(self, item: WorkItem) -> None:
        self.items.append(item)
        for file in item.files:
            verifier = Verifier(file.encoding)
            chunks = self.bus.chunks(item.crash_id, file.name, file.chunks)
            parts = [verifier.accept(chunk) async for chunk in chunks]
            verifier.finish(file.size, file.sha256)
            self.delivered[item.destination, f"{item.folder}/{file.name}"] = b"".join(parts)
            self.order.append((item.destination, file.name))
        for file in item.files:
            await self.bus.publish(
                Receipt(
                    host=item.host,
                    crash_id=item.crash_id,
                    file=file,
                    destination=item.destination,
                    url=f"{item.destination}/{item.folder}/{file.name}",
                    attempts=1,
                    shipper="stand-in",
                )
            )

    def names(self, destination: str) -> set[str]:
        return {path.rsplit("/", 1)[1] for place, path in self.delivered if place == destination}

    def content(self, destination: str, name: str) -> bytes:
        return next(
            data
            for (place, path), data in self.delivered.items()
            if place == destination and path.endswith(f"/{name}")
        )

    async def has(self, destination: str, *names: str) -> None:
        """Return once these files are delivered."""
        await until(lambda: set(names) <= self.names(destination), within=60)

    def start(self) -> "asyncio.Task[None]":
        return asyncio.create_task(self.run())


def signal_event(pid: int, disposition: str = "default") -> SignalEvent:
    """Return what the detector would say of a living process that takes a signal."""
    boot, start = identity.boot_id(), identity.start_ticks(pid)
    return SignalEvent(
        host="test-host",
        crash_id=crash_id(boot, pid, start),
        event_id=f"{pid}-{start}",
        monotonic_ns=1,
        process=Process(
            boot_id=boot, pid=pid, ns_pid=pid, start_ticks=start, uid=0, gid=0, comm="x"
        ),
        tid=pid,
        signal=11,
        signal_name="SIGSEGV",
        code=1,
        code_meaning="address not mapped to object",
        disposition=disposition,
    )


def write_set(spool: Path, pid: int, files: dict[Kind, bytes], epoch: int = EPOCH) -> str:
    """Write a set of crash files as the recorder leaves it; return its crash ID."""
    writing = Writing(spool, process(pid), epoch)
    names = {crash_file_name(kind, epoch): content for kind, content in files.items()}
    for name, content in names.items():
        (writing.place / name).write_bytes(content)
    writing.complete({name: CapturedFile(size=len(content)) for name, content in names.items()})
    return writing.crash_id
