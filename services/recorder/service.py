"""The recorder at work: threads that capture, threads that unwind, and a watch over them.

Crashes are accepted at once by the listener's thread, captured by a bounded number of threads
while their processes are held, and finished by a few others when nobody waits any more.
"""

import asyncio
import queue
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from services.common import descriptors
from services.common.health import Health
from services.common.service import Runtime, finish
from services.recorder import capturing, core_pattern, finishing, metrics, pattern_file, paused
from services.recorder.conditions import MODULE_FILES, Conditions
from services.recorder.core.room import Lack
from services.recorder.core.turns import Turns
from services.recorder.dead_letters import DeadLetters
from services.recorder.descriptors import Shares
from services.recorder.errors import CaptureFailed, RecorderError
from services.recorder.handover import takeover
from services.recorder.handover.arrival import KeptByHelper
from services.recorder.handover.arrivals import Arrivals
from services.recorder.handover.chain import Chain, Handler
from services.recorder.handover.hold import Hold, end_all_let_go, end_those_let_go
from services.recorder.handover.listener import Listener
from services.recorder.handover.mechanism import Mechanism, Plan
from services.recorder.handover.takeover import Takeover
from services.recorder.kept import adopting, left_behind, taking_up
from services.recorder.kept.orphan import Orphan
from services.recorder.kept.orphans import Orphans
from services.recorder.kept.taking_up import TakingUp
from services.recorder.patience import Patience, waiting
from services.recorder.recording import Recording, say_what_is_there
from services.recorder.settings import RecorderSettings
from services.recorder.unwinding.unwind_process import Server as UnwindServer
from services.recorder.watchdog import Watchdogs
from services.recorder.workers import Workers

log: structlog.stdlib.BoundLogger = structlog.get_logger()

STOP_WITHIN = 8.0  # seconds for what is in hand; the service is ended after 9
_TELL_WITHIN = 0.5  # seconds for the last dead letters
_UNWIND_UNTIL = 6.0  # seconds of these in which backtraces may still run
_END_WITHIN = 0.3  # seconds for the processes that were let go, of these too
_IDLE_CHECK = 0.02  # seconds between two looks whether all is done, when stopping
_STANDS_STILL_AFTER = 2.0  # seconds until a capture gets a stand-in
_COPIED_WITHIN = 30.0  # seconds for what follows a backtrace: the binaries of a new build
_TAKEN_UP_WITHIN = 1.0  # seconds for a set that the next recorder can finish as well
_LOOK_EVERY = 1.0  # seconds between two looks at what is held


async def work(runtime: Runtime, settings: RecorderSettings) -> None:
    """Record crashes until cancelled."""
    state = runtime.bus_settings.state
    with core_pattern.only_one():
        _tell_patience(settings)
        letters = DeadLetters(runtime)
        telling = asyncio.create_task(letters.run(), name="dead letters")
        recorder = Recorder(runtime, settings, letters)
        try:
            recorder.start()
            runtime.ready()
            await recorder.watch()
        finally:
            # In this order: who crashes from now on is the previous handler's.
            _put_back(state)
            recorder.stop_watchdogs()
            await asyncio.to_thread(recorder.stop, STOP_WITHIN)
            _remove_helper(state)
            await finish(letters.all_told(), _TELL_WITHIN)
            telling.cancel()
            await asyncio.wait({telling})


def _tell_patience(settings: RecorderSettings) -> None:
    try:
        pattern_file.tell_patience(paused.patience_of(settings))
    except OSError as error:
        log.warning("a guard will not see when we are paused", error=str(error))


def _put_back(state: Path) -> None:
    try:
        core_pattern.restore(state)
    except OSError as error:
        log.error("core_pattern could not be put back", error=str(error))


def _remove_helper(state: Path) -> None:
    """Leave nothing that the kernel might run as root."""
    try:
        core_pattern.remove_helper(state)
    except OSError as error:
        log.error("the pipe helper could not be removed", error=str(error))


class Recorder:
    """The threads and what they share."""

    def __init__(self, runtime: Runtime, settings: RecorderSettings, letters: DeadLetters) -> None:
        self._health: Health = runtime.health
        self._state = runtime.bus_settings.state
        self._spool = runtime.bus_settings.spool
        self._settings = settings
        self._letters = letters
        self._shares = _shares(settings)
        self._arrivals = Arrivals(self._shares.accepted)
        self._unfinished: queue.Queue[Recording] = queue.Queue(self._shares.unfinished)
        self._unwind_until: float | None = None  # monotonic seconds; set when stopping
        self._captures = Workers(
            "capture",
            self._shares.captures,
            self._arrivals,
            self._capture_one,
            _no_progress,
            lambda hold: hold.waits,
        )
        self._finishers = Workers(
            "finish", settings.backtraces, self._unfinished, self._finish_one, self._takes_too_long
        )
        self._takeover = Takeover(self._state, settings)
        self._listener = Listener(
            settings.socket, self._arrivals, settings.stall_deadline, self._takeover.greeting
        )
        self._orphans = Orphans(self._spool, self._adopt, letters.add, self._takes_too_long)
        self._taking_up = TakingUp(self._spool, self._take_up, self._takes_too_long)
        self._plan = self._takeover.prepare(self._listener.path, self._orphans)
        self._chain = _chain(self._takeover.former, settings, self._shares)
        self._patience = Patience(
            settings, self._plan.mechanism, self._arrivals, self._captures, letters.add
        )
        self._watchdogs = Watchdogs(
            self._state, settings.watchdog_deadline, runtime.bus_settings.log_format, self._plan
        )
        self._lack_of_room = Lack(self._spool, settings.disk_reserve)
        self._health.watch("spool", self._lack_of_room.fault)
        self._unwind_server = UnwindServer()
        self._turns = Turns(
            self._shares.captures, self._shares.waiting, settings.stall_deadline / 2
        )
        conditions = Conditions.of(
            runtime.bus_settings,
            settings,
            _configuration(runtime, settings, self._plan),
            self._plan.mechanism,
            self._module_files_left,
            self._lack_of_room.note,
            self._turns,
        )
        self._conditions = replace(conditions, unwind_server=self._unwind_server, chain=self._chain)
        taker = self._conditions.early_taker
        if taker is not None and self._plan.mechanism is Mechanism.SOCKET_REQUEST:
            self._listener.accept_with(taker.accept)

    def start(self) -> None:
        """Listen, then have the kernel send crashes here."""
        left_behind.take_over(self._spool)
        self._conditions.debuginfod.remove_unfinished()
        self._unwind_server.start()
        self._taking_up.start()
        self._captures.start()
        self._finishers.start()
        self._listener.start()
        self._start_watchdogs()
        if self._chain is not None:
            self._chain.start()
        self._takeover.install(self._plan)
        self._orphans.start()
        log.info("recording crashes", mechanism=self._plan.mechanism.value)

    async def watch(self) -> None:
        """See to it that no process is held for ever, and that the kernel still sends here."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            self._watchdogs.beat()
            pattern_file.beat()
            self._check_watchdogs()
            self._patience.let_go_of_stalled()
            self._captures.replace_stuck()
            self._finishers.replace_stuck()
            self._taking_up.replace_stuck()
            self._orphans.replace_stuck()
            end_those_let_go()
            await asyncio.to_thread(self._patience.give_up_waiting)
            takeover.check(self._plan, self._health)
            metrics.HELD.labels("waiting").set(self._arrivals.qsize())
            metrics.HELD.labels("capturing").set(len(self._captures.in_work()))
            metrics.HELD.labels("chained").set(self._chain.held if self._chain else 0)
            metrics.BACKTRACES_WAITING.set(self._unfinished.qsize())

    def stop(self, within: float) -> None:
        """Take what the kernel has sent already, finish what is in hand, let go of the rest.

        What is let go here stays as a record in state ``writing``, for the next recorder.
        """
        begun = time.monotonic()
        end = begun + within - _END_WITHIN
        self._unwind_until = begun + _UNWIND_UNTIL
        self._turns.stop()  # rather the stacks now than nothing at the end
        self._wait_until_idle(end)
        self._taking_up.stop(min(_TAKEN_UP_WITHIN, max(0.1, end - time.monotonic())))
        self._orphans.stop(max(0.1, end - time.monotonic()))
        # Last, for a crash that read core_pattern just before it was put back.
        self._listener.stop(max(0.1, end - time.monotonic()))
        self._wait_until_idle(end)
        if self._chain is not None:
            self._chain.stop(max(0.1, end - time.monotonic()))
        for hold in (*self._captures.in_work(), *waiting(self._arrivals)):
            hold.let_go("it was stopped")
        self._unwind_server.stop()
        end_all_let_go(_END_WITHIN)

    def stop_watchdogs(self) -> None:
        """From here on nobody waits for us who is not let go within `STOP_WITHIN`."""
        self._watchdogs.stop()

    def _adopt(self, orphan: Orphan) -> None:
        """Make crash files of what the pipe helper kept."""
        try:
            captured = adopting.adopt(orphan, self._conditions)
        except BaseException:
            orphan.close()
            raise
        self._finish_one(captured)

    def _take_up(self, pid: int, epoch: int) -> bool:
        """Finish what a killed recorder had in hand; False: another time."""
        try:
            captured = taking_up.take_up(pid, epoch, self._conditions)
        except BlockingIOError:
            return False
        if captured is not None:
            self._finish_one(captured)
        return True

    def _start_watchdogs(self) -> None:
        try:
            self._watchdogs.start()
        except OSError as error:
            raise RecorderError(f"the watchdog cannot be started: {error}") from error

    def _check_watchdogs(self) -> None:
        if self._watchdogs.are_watching:
            self._health.working("watchdog")
            return
        log.error("a watchdog is gone, or stopped: starting another")
        try:
            self._start_watchdogs()
        except RecorderError as error:
            self._health.failing("watchdog", str(error))

    def _wait_until_idle(self, end: float) -> None:
        time.sleep(_IDLE_CHECK)
        while time.monotonic() < end and not self._idle():
            time.sleep(_IDLE_CHECK)

    def _idle(self) -> bool:
        # A crash enters the second queue before it is done in the first.
        return not self._arrivals.unfinished_tasks and not self._unfinished.unfinished_tasks

    def _capture_one(self, hold: Hold) -> None:
        hold.last_progress = time.monotonic()  # it was not idle, it waited
        try:
            self._capture(hold)
        except KeptByHelper:
            log.warning("a pipe helper gave up waiting")
        except Exception as error:  # noqa: BLE001 - one crash must not end the others' thread
            self._failed(error)
        finally:
            hold.close()

    def _capture(self, hold: Hold) -> None:
        captured = capturing.capture_crash(hold, self._conditions)
        say_what_is_there(captured)
        try:
            self._unfinished.put_nowait(captured)
        except queue.Full:
            finishing.finish(captured, self._conditions, 0)

    def _finish_one(self, captured: Recording) -> None:
        try:
            finishing.finish(captured, self._conditions, self._backtrace_within())
        except Exception as error:  # noqa: BLE001 - as above; its record shows it cut short
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        metrics.CAPTURES.labels("failed").inc()
        self._letters.add(error if isinstance(error, CaptureFailed) else _unexpected(error))

    def _takes_too_long(self, _: object, since: float) -> bool:
        return time.monotonic() - since > self._settings.backtrace_deadline + _COPIED_WITHIN

    def _backtrace_within(self) -> float:
        deadline = self._settings.backtrace_deadline
        if self._unwind_until is None:
            return deadline
        return min(deadline, self._unwind_until - time.monotonic())

    def _module_files_left(self) -> int:
        in_flight = len(self._captures.in_work()) + self._unfinished.unfinished_tasks
        return MODULE_FILES if in_flight <= self._shares.with_modules else 0


def _no_progress(hold: Hold, _: float) -> bool:
    return time.monotonic() - hold.last_progress > _STANDS_STILL_AFTER


def _shares(settings: RecorderSettings) -> Shares:
    limit = descriptors.raise_limit()  # every crash holds some
    shares = Shares.of(limit, settings.captures)
    if shares.captures < settings.captures:
        log.warning(
            "few descriptors: less is captured at once (RLIMIT_NOFILE, ulimit -Hn)",
            descriptors=limit,
            captures=shares.captures,
        )
    return shares


def _chain(handler: Handler | None, settings: RecorderSettings, shares: Shares) -> Chain | None:
    if handler is None:
        return None
    return Chain(handler, settings.chain_deadline, shares.chained_at_once, shares.chained)


def _configuration(runtime: Runtime, settings: RecorderSettings, plan: Plan) -> dict[str, Any]:
    """Return the settings in force, for ``cfg``; none of them is a secret."""
    shared = runtime.bus_settings
    return {
        "recorder": settings.model_dump(mode="json"),
        "mechanism": plan.mechanism.name.lower(),
        "core_pattern": plan.pattern,
        "host": shared.host,
        "spool": str(shared.spool),
        "state": str(shared.state),
    }


def _unexpected(error: Exception) -> CaptureFailed:
    log.error("unexpected", exc_info=error)
    return CaptureFailed(
        "capture_failed", f"{type(error).__name__}: {error}", "this is a bug: please report it"
    )
