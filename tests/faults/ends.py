"""How it must end for the crashes: whole, once, and with nothing left on the way."""

import asyncio
import hashlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import nats.errors

from crashbus import Bus, DeadLetter, layout, streams
from crashbus.errors import BusUnreachable
from services.collector import plan
from tests.faults.bucket import Bucket, is_manifest
from tests.faults.crashes import CrashSet, RealCrash
from tests.support.wait import until

# Seconds; the machine may be busy, and only a fault of ours takes so long.
PATIENCE = float(os.environ.get("FAULT_PATIENCE", "110"))


@dataclass(frozen=True)
class Ends:
    """Looks at spool, bus and destination.

    Attributes:
        bus: the test's own connection.
        nats_url: for commands.
        ledger: the collector's directory.
        logs: returns what the services said.
    """

    bus: Bus
    nats_url: str
    bucket: Bucket
    spool: Path
    ledger: Path
    logs: Callable[[], str]

    async def delivered(self, crashes: Iterable[CrashSet]) -> None:
        """Return once every crash is delivered, bit for bit and once, and nothing is left."""
        wanted = list(crashes)
        await self._until(lambda: self._have_manifests(wanted), "all manifests")
        await self._until(self._nothing_left, "nothing left on the way")
        objects = await asyncio.to_thread(self.bucket.crashes)
        for crash in wanted:
            await asyncio.to_thread(self.bucket.check, crash, objects[crash.crash_id])
        await asyncio.to_thread(self.bucket.remove, [objects[crash.crash_id] for crash in wanted])

    async def _until(self, condition: Callable[[], bool | Awaitable[bool]], what: str) -> None:
        try:
            await until(condition, PATIENCE, every=0.2)
        except TimeoutError as error:
            letters = [
                (letter.crash_id, letter.reason, letter.error)
                for letter in await self.bus.stored(DeadLetter)
            ]
            consumers = await self.bus._js.consumers_info(streams.FILES)
            print(await self._left(), consumers, letters, self.logs(), sep="\n")
            raise AssertionError(f"{what}: {error}") from None

    async def _have_manifests(self, crashes: list[CrashSet]) -> bool:
        objects = await self.bucket.look()
        return all(
            any(is_manifest(key) for key in objects.get(crash.crash_id, [])) for crash in crashes
        )

    async def _nothing_left(self) -> bool:
        try:
            return not any(await self._left())
        except nats.errors.Error as error:  # killed just before, or its streams are made anew
            print(f"the bus does not tell: {error}")
            return False

    async def _left(self) -> tuple[int, int, list[str]]:
        """Return how many work items and chunks wait, and the uploads that are not complete."""
        items, chunks = await on_the_way(self.bus)
        return items, chunks, await asyncio.to_thread(self.bucket.uploads)

    async def spool_is_empty(self) -> None:
        """Return once nothing of any crash is left in the spool and in the ledger."""

        def look() -> bool:
            return not any(self.spool.glob("[0-9]*")) and not any(self.ledger.glob("*.json"))

        await self._until(look, "an empty spool")

    async def told(self, crashes: Iterable[RealCrash]) -> list[str]:
        """Return what became of each crash, once it can be seen: delivered, cut short or failed."""
        wanted, ends = list(crashes), dict[str, str]()

        async def look() -> bool:
            objects = await self.bucket.look()
            try:
                letters = await self.bus.stored(DeadLetter)
            except BusUnreachable:  # or its streams are made anew
                return False
            for crash in wanted:
                if any(is_manifest(key) for key in objects.get(crash.crash_id, [])):
                    ends[crash.crash_id] = "delivered"
                elif found := [one for one in letters if _is_an_end(one, crash)]:
                    print([(one.reason, one.error) for one in found])
                    ends[crash.crash_id] = "failed"
            return len(ends) == len(wanted)

        await self._until(look, "an end that can be seen")
        await self._until(self._nothing_left, "nothing left on the way")
        objects = await asyncio.to_thread(self.bucket.crashes)
        for crash in wanted:
            if ends[crash.crash_id] == "delivered":
                keys = objects[crash.crash_id]
                if not await asyncio.to_thread(self._is_whole, crash, keys):
                    ends[crash.crash_id] = "cut short"
        return [ends[crash.crash_id] for crash in wanted]

    def _is_whole(self, crash: RealCrash, keys: list[str]) -> bool:
        """Check a delivered crash against the spool; return whether it is whole."""
        manifest = self.bucket.manifest(keys)
        assert manifest.process.pid == crash.pid
        own = [file for file in manifest.files if file.kind not in layout.SHARED]
        for file in own:
            content = self.bucket.content(manifest.folder, file.stored_name)
            assert hashlib.sha256(content).hexdigest() == file.sha256, file.name
            source = self.spool / str(crash.pid) / file.name
            # What was delivered goes first where the disk is full.
            assert not source.exists() or source.read_bytes() == content, file.name
        assert len(keys) == len(own) + 1, f"more than one delivery of it: {keys}"
        return len(own) == 6 and not any(file.truncated for file in own)

    async def failed(self, crashes: Iterable[CrashSet]) -> None:
        """Return once every file of these crashes is told to have failed."""
        wanted = {(crash.crash_id, name) for crash in crashes for name in crash.sha256}

        async def look() -> bool:
            letters = await self.bus.stored(DeadLetter)
            told = {
                (one.crash_id, file.name) for one in letters if one.work for file in one.work.files
            }
            return wanted <= told

        await self._until(look, "dead letters")

    async def replayed(self, crashes: Iterable[CrashSet]) -> None:
        """Ask for what failed until it is delivered; the server may need a while to know better."""
        wanted = list(crashes)

        async def ask() -> bool:
            if await self._have_manifests(wanted):
                return True
            asking = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "crashbus", "retry", "--all"),
                env={**os.environ, "CRASHBUS_NATS_URL": self.nats_url},
            )
            await asking.wait()
            await asyncio.sleep(1)
            return False

        await self._until(ask, "a delivery of what failed")


def _is_an_end(letter: DeadLetter, crash: RealCrash) -> bool:
    """Tell whether files are given up; the collector answers some letters by sending them again."""
    return letter.crash_id == crash.crash_id and letter.reason not in plan.RENEWED


async def on_the_way(bus: Bus) -> tuple[int, int]:
    """Return how many work items and chunks are on the bus."""
    names = (streams.FILES, streams.CHUNKS, streams.SMALL_CHUNKS)
    items, *chunks = [(await bus._js.stream_info(name)).state.messages for name in names]
    return items, sum(chunks)
