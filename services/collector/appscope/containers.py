"""Which processes are watched, and where there are too many."""

import asyncio
from functools import partial
from pathlib import Path

import structlog

from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable
from crashbus.messages import DeadLetter, SignalEvent
from services.collector.appscope import inside
from services.collector.appscope.inside import Unsafe
from services.collector.appscope.notes import Note, Notes
from services.collector.appscope.threads import STILL, NoThread, Shares, StandsStill, Threads
from services.collector.appscope.watch import ROOM, Watch

log: structlog.stdlib.BoundLogger = structlog.get_logger()

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
        self._notes = Notes(state)
        self._threads = Threads()
        self._shares = Shares()
        self._watches: dict[str, Watch] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def resume(self) -> None:
        """Go on watching what was watched before a restart."""
        for note in await self._notes.all():
            self._start(note, is_resumed=True)

    async def watch(self, event: SignalEvent) -> None:
        """Bring out every set that the process of this event writes from now on.

        Returns once a restart would not forget it.

        Raises:
            OSError: it would.
        """
        if event.crash_id not in self._watches and await self._has_own_place(event):
            if not await self._has_room_for(event.crash_id):
                await self._tell(event, f"more than {AT_ONCE} processes under AppScope at once")
                return
            if event.crash_id not in self._watches:  # by another event meanwhile
                self._start(Note.model_validate(event.model_dump()))
        if event.crash_id in self._watches:
            await asyncio.shield(self._watches[event.crash_id].noted)

    async def has_written(self, event: SignalEvent) -> bool:
        """Tell whether the process of this event has begun to write a set, or none can tell."""
        try:
            ask = partial(inside.has_set, event)
            return await self._shares.look(self._threads, event.process, ask)
        except (Unsafe, NoThread, StandsStill):
            return True

    async def stop(self) -> None:
        """Watch no longer, once what is being copied is there; `resume` goes on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._threads.shutdown(wait=False)

    async def _has_own_place(self, event: SignalEvent) -> bool:
        ask = partial(inside.has_own_place, event, self._root)
        try:
            return await self._shares.look(self._threads, event.process, ask)
        except (Unsafe, NoThread, StandsStill) as error:
            await self._tell(event, str(error), error.mend)
            return False

    async def _has_room_for(self, crash_id: str) -> bool:
        """Tell whether one more can be watched; who only waits for the disk gives its place up."""
        while len(self._watches) >= AT_ONCE and crash_id not in self._watches:
            ended = next((name for name, one in self._watches.items() if one.waits_for_room), None)
            if ended is None:
                return False
            self._watches[ended].leave_soon()
            await asyncio.wait([self._tasks[ended]], timeout=STILL)
        return True

    def _start(self, note: Note, is_resumed: bool = False) -> None:
        name = note.crash_id
        tell = partial(self._tell, note)
        self._watches[name] = watch = Watch(
            note, self._root, self._reserve, self._notes, self._threads, tell, is_resumed
        )
        self._tasks[name] = task = asyncio.create_task(watch.run(), name=f"container {name}")

        def forget(_: "asyncio.Task[None]") -> None:
            del self._watches[name], self._tasks[name]

        task.add_done_callback(forget)

    async def _tell(self, event: SignalEvent, error: str, mend: str = ROOM) -> None:
        letter = DeadLetter(
            host=self._host,
            crash_id=event.crash_id,
            service="collector",
            reason="not_brought_out",
            error=f"AppScope's files inside a container were not brought out: {error}",
            mend=mend,
        )
        try:
            await self._bus.publish(letter)
        except (BusUnreachable, BusFull) as failure:
            log.error("could not tell", crash_id=event.crash_id, error=str(failure))
