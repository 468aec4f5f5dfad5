"""The detector's loop: two threads take what the kernel saw, and put it into the outbox.

One thread polls the ring buffer and does nothing else, so that the kernel finds room; the other
makes events of it. Between them stands a bounded queue: when that is full, the ring buffer fills
and the kernel counts what it drops, so events are lost in one place only, and told of.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator

import structlog

from crashbus import identity, signals
from crashbus.messages import EventsLost, SignalCount
from services.common.outbox import Outbox, Outgoing
from services.detector import metrics
from services.detector.counts import Counts
from services.detector.events import Clock, signal_event
from services.detector.proc import describe, handler_in_appscope
from services.detector.program import Program
from services.detector.record import MalformedRecord, Record, parse
from services.detector.settings import DetectorSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

POLL_MILLISECONDS = 100  # how soon a stop is noticed; events wake the poll at once
_QUEUE = 8192  # records, 3 KiB each at most
_BATCH = 128  # records that are stored at once


class Detector:
    """Sees crash signals from `start` to `stop`.

    Args:
        notify: called when something was put into the outbox, from any thread.
    """

    def __init__(
        self, settings: DetectorSettings, host: str, outbox: Outbox, notify: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._host = host
        self._outbox = outbox
        self._notify = notify
        self._boot_id = identity.boot_id()
        self._queue: queue.Queue[bytes | None] = queue.Queue(_QUEUE)
        self._counts = Counts()
        self._lock = threading.Lock()  # of start, tick and stop
        self._program: Program | None = None
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lost = self._counted = 0
        self._ticked = time.monotonic()
        self.failure: Exception | None = None

    def start(self) -> None:
        """Load the program and see signals from now on; takes about a second.

        Raises:
            ProgramError, BtfError: the kernel refuses.
        """
        with self._lock:
            if self._stopping.is_set():
                return
            self._program = Program(
                self._settings.signal_numbers,
                self._settings.handled_quiet,
                self._settings.ring_pages,
                self._queue.put,
            )
            self._program.attach()
            for work in (self._poll, self._store):
                thread = threading.Thread(target=self._guarded, args=(work,), daemon=True)
                thread.start()
                self._threads.append(thread)

    def stop(self, within: float) -> None:
        """See no more, store what was seen, unload."""
        self._stopping.set()
        with self._lock:
            if self._program is None:
                return
            self._program.detach()
            end = time.monotonic() + within
            for thread in self._threads:
                thread.join(max(0.0, end - time.monotonic()))
            self._tell_counts(self._program)
            if any(thread.is_alive() for thread in self._threads):
                log.error("the detector did not stop in time, events may be lost")
                return  # a thread that polls must not find its program unloaded
            self._program.close()
            self._program = None

    def tick(self) -> None:
        """Tell what was counted since the last tick; to be called every second."""
        with self._lock:
            if self._program is not None:
                self._tell_counts(self._program)

    def _guarded(self, work: Callable[[Program], None]) -> None:
        assert self._program is not None
        try:
            work(self._program)
        except Exception as error:  # noqa: BLE001 - the top of a thread
            self.failure = error

    def _poll(self, program: Program) -> None:
        try:
            while not self._stopping.is_set():
                program.poll(POLL_MILLISECONDS)
            program.drain()
        finally:
            self._queue.put(None)

    def _store(self, _program: Program) -> None:
        for batch in self._batches():
            clock = Clock.now()
            messages = [message for raw in batch for message in self._event(raw, clock)]
            self._outbox.put(messages)
            self._notify()

    def _batches(self) -> Iterator[list[bytes]]:
        """Yield what has come, as soon as something has; end after the poll has ended."""
        while (first := self._queue.get()) is not None:
            batch = [first]
            while len(batch) < _BATCH and not self._queue.empty():
                further = self._queue.get()
                if further is None:
                    yield batch
                    return
                batch.append(further)
            yield batch

    def _event(self, raw: bytes, clock: Clock) -> Iterator[Outgoing]:
        try:
            yield self._message(parse(raw), clock)
        except (MalformedRecord, ValueError) as error:  # a field out of its range
            metrics.MALFORMED.inc()
            log.error("the kernel's record makes no event", error=str(error))

    def _message(self, record: Record, clock: Clock) -> Outgoing:
        process = describe(record, self._boot_id)
        in_appscope = handler_in_appscope(record)
        event = signal_event(record, process, self._host, clock, in_appscope)
        if not event.fatal:
            self._counts.saw(process)
        metrics.EVENTS.labels(event.disposition).inc()
        metrics.DELAY.observe(max(0.0, time.time() - event.time))
        tell = log.info if event.fatal else log.debug
        tell(
            "signal event",
            crash_id=event.crash_id,
            signal=event.signal_name,
            disposition=event.disposition,
            pid=process.pid,
            comm=process.comm,
        )
        return Outgoing.of(event, expendable=not event.fatal)

    def _tell_counts(self, program: Program) -> None:
        now = time.monotonic()
        period, self._ticked = max(now - self._ticked, 0.001), now
        messages = [*self._lost_messages(program), *self._count_messages(program, period)]
        if messages:
            self._outbox.put(messages)
            self._notify()

    def _lost_messages(self, program: Program) -> Iterator[Outgoing]:
        total = program.lost()
        new, self._lost = total - self._lost, total
        if new:
            metrics.RING_LOST.inc(new)
            log.error(
                "the ring buffer was full, events are lost",
                count=new,
                mend="raise CRASHBUS_DETECTOR_RING_PAGES",
            )
            yield Outgoing.of(EventsLost(host=self._host, stage="ring_buffer", count=new))

    def _count_messages(self, program: Program, period: float) -> Iterator[Outgoing]:
        total = program.counted()
        if total == self._counted:
            return
        metrics.COUNTED.inc(total - self._counted)
        self._counted = total
        found, unknown = self._counts.news(program.handled())
        metrics.UNKNOWN.inc(unknown)
        for one in found:
            process = one.process
            message = SignalCount(
                host=self._host,
                crash_id=identity.crash_id(process.boot_id, process.pid, process.start_ticks),
                process=process,
                signal=one.signal,
                signal_name=signals.name(one.signal),
                count=one.count,
                period=period,
            )
            yield Outgoing.of(message, expendable=True)
