"""Which processes are watched, each by a task of its own, and what a restart must not forget."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog
from pydantic import ValidationError

from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable
from crashbus.messages import DeadLetter, SignalEvent
from services.collector import metrics
from services.collector.appscope.inside import is_contained
from services.collector.appscope.sets import Watched

T = TypeVar("T")

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_AGAIN = 0.05  # seconds between looks while a set is being written
LOOK_IDLY = 1.0  # seconds, later: the library pauses for two after each core
WRITING = 10.0  # seconds after a signal in which its set may still be written
AT_ONCE = 256  # processes watched at a time; more are told in the log


class Containers:
    """Watches the processes in containers whose signals AppScope's library handles.

    A process that recovers is watched until it ends: it may write a set for each signal, of
    which the detector publishes but the first.

    Args:
        root: the spool.
        state: directory for notes of what is watched.
        reserve: percent of the spool's disk that cores leave free.
    """

    def __init__(self, root: Path, host: str, bus: Bus, state: Path, reserve: float) -> None:
        self._root = root
        self._reserve = reserve
        self._host = host
        self._bus = bus
        self._state = state
        self._watches: dict[str, asyncio.Task[None]] = {}

    async def resume(self) -> None:
        """Go on watching what was watched before a restart."""
        for event in await asyncio.to_thread(self._noted):
            self._start(event)

    def _noted(self) -> list[SignalEvent]:
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        events = []
        for path in self._state.glob("*.json"):
            try:
                events.append(SignalEvent.model_validate_json(path.read_bytes()))
            except ValidationError as error:
                log.error("a note of a watch cannot be read", path=str(path), error=str(error))
                path.unlink()
        return events

    async def watch(self, event: SignalEvent) -> None:
        """Bring out every set that the process of this event writes from now on.

        Returns once a restart would not forget it.
        """
        if event.crash_id in self._watches or not await asyncio.to_thread(is_contained, event):
            return
        if len(self._watches) >= AT_ONCE:
            await self._tell(event, f"more than {AT_ONCE} processes under AppScope at once")
            return
        await asyncio.to_thread(self._note(event).write_text, event.model_dump_json())
        self._start(event)

    async def stop(self) -> None:
        """Watch no longer, once what is being copied is there; `resume` goes on."""
        tasks = list(self._watches.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _note(self, event: SignalEvent) -> Path:
        return self._state / f"{event.crash_id}.json"

    def _start(self, event: SignalEvent) -> None:
        task = asyncio.create_task(self._bring_out(event), name=f"container {event.crash_id}")
        self._watches[event.crash_id] = task
        task.add_done_callback(lambda _: self._watches.pop(event.crash_id, None))

    async def _bring_out(self, event: SignalEvent) -> None:
        try:
            await self._until_it_ends(event)
        except Exception as error:  # nobody awaits this task
            metrics.FAULTS.labels("containers").inc()
            log.exception("cannot bring out of a container", crash_id=event.crash_id)
            await self._tell(event, str(error))
        await asyncio.to_thread(self._note(event).unlink, True)

    async def _until_it_ends(self, event: SignalEvent) -> None:
        with Watched(event, self._root, self._host, self._reserve) as watched:
            busy_until = time.monotonic() + WRITING
            while await _to_its_end(watched.look):
                if await _to_its_end(watched.copy_whole):
                    busy_until = time.monotonic()
                busy = time.monotonic() < busy_until
                await asyncio.sleep(LOOK_AGAIN if busy else LOOK_IDLY)
            try:
                while await _to_its_end(watched.copy_rest):
                    await asyncio.sleep(LOOK_IDLY)
            finally:  # also when we are stopped: nobody can open these files again
                await _to_its_end(watched.keep_rest)

    async def _tell(self, event: SignalEvent, error: str) -> None:
        letter = DeadLetter(
            host=self._host,
            crash_id=event.crash_id,
            service="collector",
            reason="not_brought_out",
            error=f"AppScope's files inside a container were not brought out: {error}",
            mend="make room on the spool's disk; what the recorder captured is not affected",
        )
        try:
            await self._bus.publish(letter)
        except (BusUnreachable, BusFull) as failure:
            log.error("could not tell", crash_id=event.crash_id, error=str(failure))


async def _to_its_end(work: Callable[[], T]) -> T:
    """Do work in a thread, and wait for its end also when cancelled: it uses open files."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise
