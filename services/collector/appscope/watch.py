"""One process that is watched, by a task of its own, until it has ended and its sets are out."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import structlog

from services.collector import metrics
from services.collector.appscope.inside import Unsafe
from services.collector.appscope.notes import Note, Notes
from services.collector.appscope.sets import Watched
from services.collector.appscope.threads import StandsStill, Steps, to_its_end

T = TypeVar("T")

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_AGAIN = 0.05  # seconds between looks while a set is being written
LOOK_IDLY = 1.0  # seconds, later: the library pauses for two after each core
WRITING = 10.0  # seconds after a signal in which its set may still be written
ROOM = "make room on the spool's disk; what the recorder captured is not affected"
_UNSEEN = (
    "its process ended while no collector ran, and what it wrote last was not seen",
    "keep the collector running; what the recorder captured is not affected",
)

Tell = Callable[[str, str], Awaitable[None]]  # an error, and what would mend it


class Watch:
    """Watches one process.

    Args:
        root: the spool.
        reserve: percent of the spool's disk that cores leave free.
        threads: where the process's files are read.
        is_resumed: nobody watched the process for some time.

    Attributes:
        noted: done once a restart would not forget it.
    """

    def __init__(
        self,
        note: Note,
        root: Path,
        reserve: float,
        notes: Notes,
        threads: Executor,
        tell: Tell,
        is_resumed: bool = False,
    ) -> None:
        self._note = note
        self._notes = notes
        self._threads = threads
        self._tell = tell
        self._is_resumed = is_resumed
        self._steps = Steps()
        self._watched = Watched(note, root, reserve, self._steps.step, dict(note.brought_out))
        self._others_wait: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_stuck = False
        self.noted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def waits_for_room(self) -> bool:
        """Whether the process has ended and what is left of it waits for room on the disk."""
        return not self._watched.alive and not self._is_stuck

    def leave_soon(self) -> None:
        """Wait for room on the disk no longer: a living process needs the place."""
        if not self._others_wait.done():
            self._others_wait.set_result(None)

    async def run(self) -> None:
        """Bring out what the process writes, until it has ended or we are stopped."""
        if not await self._is_noted():
            return
        try:
            await self._until_it_ends()
        except StandsStill as still:
            await self._tell(str(still), still.mend)
            await still.left()  # the place is taken for as long as the thread is
        except asyncio.CancelledError:
            if self._watched.alive:
                self._watched.close()
                with suppress(OSError):
                    await self._keep_note()
                raise
        except Unsafe as error:
            await self._tell(str(error), error.mend)
        except Exception as error:  # nobody awaits this task
            metrics.FAULTS.labels("containers").inc()
            log.exception("cannot bring out of a container", crash_id=self._note.crash_id)
            await self._tell(str(error), ROOM)
        self._watched.close()
        await self._notes.remove(self._note)

    async def _is_noted(self) -> bool:
        try:
            if not self._is_resumed:
                await self._keep_note()
        except OSError as error:
            self.noted.set_exception(error)
            return False
        self.noted.set_result(None)
        return True

    async def _until_it_ends(self) -> None:
        try:
            await self._while_it_lives()
            if self._is_resumed and not self._watched.brought_out:
                await self._tell(*_UNSEEN)
            while await self._do(self._watched.copy_rest) and not self._others_wait.done():
                await asyncio.wait([self._others_wait], timeout=LOOK_IDLY)
        finally:  # also when we are stopped: nobody may be able to open these files again
            if not self._is_stuck:
                await self._do(self._watched.keep)

    async def _while_it_lives(self) -> None:
        busy_until = time.monotonic() + WRITING
        while await self._do(self._watched.look):
            if self._watched.has_whole and await self._do(self._watched.copy_whole):
                busy_until = time.monotonic()
                await self._keep_note()
            busy = time.monotonic() < busy_until
            await asyncio.sleep(LOOK_AGAIN if busy else LOOK_IDLY)

    async def _do(self, work: Callable[[], T]) -> T:
        try:
            return await to_its_end(self._threads, work, self._steps)
        except StandsStill:
            self._is_stuck = True
            raise

    async def _keep_note(self) -> None:
        update = {"brought_out": self._watched.brought_out}
        await self._notes.keep(self._note.model_copy(update=update))
