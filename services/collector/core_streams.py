"""Cores that come straight from the recorder and lie nowhere but on the bus.

The recorder hands them over on a socket (`services.common.core_stream`) while it holds the process,
and gets back what file the bus has now, which it notes in the capture record. So the record tells,
as for every other set, what there is. What is on the bus of a core that no record will name, for
one of both was killed, is taken back by a mark on disk.
"""

import asyncio
import json
import os
import select
import socket
from contextlib import suppress
from pathlib import Path

import structlog

from crashbus import layout
from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable
from crashbus.layout import Kind
from crashbus.parts import CrashFile
from services.collector import metrics, spool
from services.collector.core_frames import Broken, CoreFrames
from services.collector.ledger import Ledger, Source
from services.collector.publish import Publisher, SourceLost
from services.collector.spool import Refused
from services.common import capture, core_stream
from services.common.capture import UnreadableRecord
from services.common.core_stream import Announced, Answer
from services.common.crash_directory import SpoolUnusable

log: structlog.stdlib.BoundLogger = structlog.get_logger()

AT_ONCE = 4  # cores; each has a window of some 20 MiB
WAITING = 256  # connections that wait for their turn
LOOK_EVERY = 5.0  # seconds between looks whether the socket is still there
_GONE_EVERY = 0.5  # seconds between looks whether the recorder is


class CoreStreams:
    """Takes cores from the recorder.

    Args:
        root: the spool.
        marks: directory for the marks.
    """

    def __init__(
        self, root: Path, bus: Bus, ledger: Ledger, publisher: Publisher, marks: Path
    ) -> None:
        self._root = root
        self._bus = bus
        self._ledger = ledger
        self._publisher = publisher
        self._marks = marks
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._connections: set[asyncio.Task[None]] = set()

    def has(self, crash_id: str) -> bool:
        """Tell whether the bus has, or gets, a core that the ledger does not know of yet."""
        return crash_id in self._publisher.receiving or (self._marks / crash_id).exists()

    async def run(self) -> None:
        """Take cores until cancelled."""
        try:
            while True:
                try:
                    await self._serve()
                except (OSError, SpoolUnusable) as error:
                    log.warning("no cores are taken from the recorder", error=str(error))
                    await asyncio.sleep(LOOK_EVERY)
        finally:
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self) -> None:
        """Listen until the socket is no longer the one in the spool."""
        with await asyncio.to_thread(core_stream.listen, self._root) as listening:
            listening.setblocking(False)
            ours = core_stream.identity(self._root)
            accepting = asyncio.create_task(self._accept(listening), name="cores")
            try:
                while ours and core_stream.identity(self._root) == ours:
                    await self._tidy()
                    done, _ = await asyncio.wait({accepting}, timeout=LOOK_EVERY)
                    for task in done:
                        task.result()
            finally:
                accepting.cancel()
                await asyncio.wait({accepting})

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listening)
            connection.setblocking(False)
            if len(self._connections) >= WAITING:
                connection.close()
                continue
            task = asyncio.create_task(self._attend(connection), name="core")
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _attend(self, connection: socket.socket) -> None:
        """Take one core, for as long as the recorder is there."""
        has_turn = asyncio.Event()
        with connection:
            taking = asyncio.create_task(self._take(connection, has_turn))
            try:
                while not taking.done():
                    await asyncio.wait({taking}, timeout=_GONE_EVERY)
                    if _is_closed(connection):
                        taking.cancel()
                    elif not has_turn.is_set():
                        with suppress(OSError):
                            connection.send(core_stream.QUEUED)
            finally:
                taking.cancel()
                await asyncio.wait({taking})
            if not taking.cancelled() and (error := taking.exception()):
                metrics.FAULTS.labels("cores").inc()
                log.error("cannot take a core", error=repr(error))

    async def _take(self, connection: socket.socket, has_turn: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        async with self._turns:
            has_turn.set()
            try:
                await loop.sock_sendall(connection, core_stream.GREETING)
                stream = CoreFrames(connection)
                announced = await stream.announced()
                answer = await self._answer(announced, stream)
                await loop.sock_sendall(connection, answer.model_dump_json().encode())
            except (Broken, OSError) as error:
                log.info("a core did not come to its end", because=str(error))

    async def _answer(self, announced: Announced, stream: CoreFrames) -> Answer:
        """Put a core on the bus; what is there of one that fails is taken back."""
        crash_id = announced.crash_id
        while (former := self._publisher.receiving.get(crash_id)) is not None:
            await former.wait()  # an attempt of which the last is just taken back
        settled = self._publisher.receiving[crash_id] = asyncio.Event()
        try:
            return Answer(file=await self._publish(announced, stream))
        except (BusFull, BusUnreachable) as error:
            return Answer(fault=str(error), is_blocked=True)
        except SourceLost as error:
            return Answer(fault=str(error))
        finally:
            del self._publisher.receiving[crash_id]
            settled.set()

    async def _publish(self, announced: Announced, stream: CoreFrames) -> CrashFile:
        crash_id, name = announced.crash_id, announced.name
        try:
            await asyncio.to_thread(self._mark, announced)
        except OSError as error:
            raise SourceLost(
                "state_unusable", f"CRASHBUS_STATE cannot be written to: {error.strerror}"
            ) from error
        await self._bus.purge_chunks(crash_id, name)
        source = Source(directory=announced.directory, name=name, kind=Kind.CORE)
        file = await self._publisher.publish_stream(crash_id, source, stream.read)
        if await self._bus.chunk_count(crash_id, name) < file.chunks:
            await self._bus.purge_chunks(crash_id, name)
            raise Broken("the bus lost some of it: it was started with an empty store meanwhile")
        metrics.STREAMED.inc()
        log.info("core taken", crash_id=crash_id, size=file.size, stored=file.stored_size)
        return file

    def _mark(self, announced: Announced) -> None:
        self._marks.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps([announced.directory, announced.name])
        new = self._marks.with_suffix(f".{announced.crash_id}")
        try:
            new.write_text(text)
            new.rename(self._marks / announced.crash_id)
        except OSError:
            new.unlink(missing_ok=True)
            raise

    async def _tidy(self) -> None:
        """Take back what is on the bus of cores that no record names, and never will."""
        for mark in await asyncio.to_thread(lambda: list(self._marks.glob("*"))):
            crash_id = mark.name
            if crash_id in self._publisher.receiving:
                continue
            settled = self._publisher.receiving[crash_id] = asyncio.Event()
            try:
                await self._settle(mark)
            except (OSError, ValueError, BusUnreachable) as error:
                log.warning("a core of no crash stays on the bus for now", error=str(error))
            finally:
                del self._publisher.receiving[crash_id]
                settled.set()

    async def _settle(self, mark: Path) -> None:
        """Remove a mark that is needed no more, and what it tells of if nobody else does."""
        directory, name = json.loads(await asyncio.to_thread(mark.read_text))
        crash = self._ledger.get(mark.name)
        if crash is None or name not in crash.sources:
            if await asyncio.to_thread(self._is_named, directory, name):
                return
            await self._bus.purge_chunks(mark.name, name)
        await asyncio.to_thread(mark.unlink, missing_ok=True)

    def _is_named(self, directory: str, name: str) -> bool:
        """Tell whether a core's record says that the bus has it, or may still come to."""
        parsed = layout.parse_crash_file_name(name)
        if parsed is None:
            return False
        record = layout.crash_file_name(Kind.CAPTURE, parsed[1])
        try:
            with (
                spool.open_directory(str(self._root)) as root,
                spool.open_directory(directory, root) as place,
            ):
                file = spool.open_file(record, place, owner=0)
        except FileNotFoundError:
            return False
        except Refused:
            return True  # who cannot look must not take it back
        try:
            if capture.is_being_written(file):
                return True
            captured = capture.read(file).files.get(name)
        except UnreadableRecord:
            return False
        finally:
            os.close(file)
        return captured is not None and captured.sent is not None


def _is_closed(connection: socket.socket) -> bool:
    waiting = select.poll()
    with suppress(ValueError):  # closed by us
        waiting.register(connection, select.POLLRDHUP)
    return bool(waiting.poll(0))
