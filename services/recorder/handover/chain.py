"""The former owner of core_pattern, who still gets each core if the user asks for it.

The pipe helper stays where the kernel has started it, and starts the owner's handler when we say
so: just as the kernel would, and with the arguments that the kernel itself made of the owner's
template (helper/chain.c). Its standard input is the core that we have captured, so that no handler
can stop a stream. Until it ends, or its deadline, the process stays held, because a handler reads
its ``/proc``; nothing else of the recorder waits for it.
"""

import os
import queue
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import structlog

from services.recorder import metrics
from services.recorder.errors import RecorderError
from services.recorder.handover.hold import Hold
from services.recorder.handover.mechanism import HELPER
from services.recorder.workers import Workers

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_GRACE = 2.0  # seconds beyond the deadline for the helper to end the handler
_SPACE = rb"[ \t-\r\xa0]"  # what the kernel's isspace() takes for one
_NEXT = b"%"  # in an order: the next argument that the kernel made


class CannotChain(RecorderError):
    """This core_pattern has no owner that could be started."""


@dataclass(frozen=True)
class Handler:
    """A pipe handler, as its core_pattern names it; core(5).

    Attributes:
        words: the program and its arguments, split as the kernel does, templates not expanded.
    """

    words: tuple[bytes, ...]

    @classmethod
    def parse(cls, pattern: str) -> Self:
        """Read a core_pattern.

        Raises:
            CannotChain: it names no handler.
        """
        raw = os.fsencode(pattern)
        if not raw.startswith(b"|"):
            who = "a coredump socket" if raw.startswith(b"@") else "the kernel, which writes files"
            raise CannotChain(f"core_pattern was {pattern!r}: {who}, no handler to start")
        # A percent sign swallows whatever it gives no meaning to, the space behind it too.
        known = re.sub(rb"%" + _SPACE, b"", raw[1:].replace(b"%%", b"%\0"))
        words = tuple(
            word.replace(b"%\0", b"%%") for word in re.split(_SPACE + rb"+", known) if word
        )
        program = words[0] if words else b""
        if not program.startswith(b"/") or b"%" in program:
            raise CannotChain(f"core_pattern was {pattern!r}: its handler has no absolute path")
        if Path(os.fsdecode(program)).name == HELPER:
            raise CannotChain(f"core_pattern was {pattern!r}: that is a recorder's own helper")
        return cls(words)

    @property
    def program(self) -> str:
        """Its path."""
        return os.fsdecode(self.words[0])

    @property
    def templates(self) -> str:
        """What the kernel has to expand, for the end of our core_pattern; corepipe.c."""
        return " ".join(("+", *(os.fsdecode(word) for word in self.words if b"%" in word)))

    def order(self, seconds: int) -> bytes:
        """Return what the helper is told; chain.h."""
        words = (_NEXT if b"%" in word else word for word in self.words)
        return b"".join(word + b"\0" for word in (str(seconds).encode(), *words))


@dataclass
class Turn:
    """A crash whose handler is to be started, or runs.

    Attributes:
        hold: keeps the process, and has the pipe helper that waits for us.
        core: open for reading, from its start.
        until: monotonic seconds at which the process is let go in any case.
    """

    crash_id: str
    hold: Hold
    core: int
    until: float

    def close(self, because: str) -> None:
        """Let the process go."""
        self.hold.let_go(because)
        self.hold.close()
        if self.core >= 0:
            os.close(self.core)
            self.core = -1


class Chain:
    """Has the handler started for each crash, a number of them at once.

    Args:
        deadline: seconds for one crash, waiting included.
        waiting: crashes held until a handler has ended; of more, none is started.
    """

    def __init__(self, handler: Handler, deadline: float, at_once: int, waiting: int) -> None:
        self._handler = handler
        self._deadline = deadline
        self._turns: queue.Queue[Turn] = queue.Queue(waiting)
        self._workers = Workers("chain", at_once, self._turns, self._take, lambda *_: False)

    def start(self) -> None:
        """Start its threads."""
        self._workers.start()

    def add(self, crash_id: str, hold: Hold, core_file: int) -> None:
        """Take over a captured process; for its own hold it is let go.

        Args:
            core_file: of the core that was captured.
        """
        if not hold.is_held:
            return self.skip(crash_id, "its process was let go")
        try:
            # An open file of its own: the handler reads from the start, and cannot write.
            core = os.open(f"/proc/self/fd/{core_file}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            return self.skip(crash_id, f"no descriptor for its core: {error.strerror}")
        try:
            turn = Turn(crash_id, hold.hand_on(), core, time.monotonic() + self._deadline)
        except OSError as error:
            os.close(core)
            return self.skip(crash_id, f"no descriptor to hold it: {error.strerror}")
        try:
            self._turns.put_nowait(turn)
        except queue.Full:
            turn.close("too many wait for their former handler")
            self.skip(crash_id, f"{self._turns.maxsize} others wait already")

    def skip(self, crash_id: str, why: str) -> None:
        """Tell of a crash that the handler gets nothing of."""
        self._end(crash_id, "skipped", why)

    @property
    def held(self) -> int:
        """How many processes are held for it."""
        return self._turns.unfinished_tasks

    def stop(self, within: float) -> None:
        """Wait for the handlers that run, then let all processes go; helpers end the handlers."""
        end = time.monotonic() + within
        while self._turns.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.02)
        with self._turns.mutex:
            waiting = list(self._turns.queue)
        for turn in (*self._workers.in_work(), *waiting):
            turn.hold.let_go("the recorder was stopped")

    def _take(self, turn: Turn) -> None:
        began = time.monotonic()
        result, why = "failed", ""
        try:
            result, why = self._run(turn)
        except TimeoutError:
            result, why = "timed_out", "the pipe helper does not answer"
        except OSError as error:
            why = f"the pipe helper is gone: {error.strerror}"
        finally:
            turn.close("its former handler has had its turn")
            metrics.CHAIN_SECONDS.observe(time.monotonic() - began)
            self._end(turn.crash_id, result, why)

    def _run(self, turn: Turn) -> tuple[str, str]:
        """Have the handler started and wait for its end; return what became of it, and why."""
        left = turn.until - time.monotonic()
        helper = turn.hold.helper
        if left <= 0 or helper is None:
            return "skipped", f"others took all of the {self._deadline:g} s"
        helper.settimeout(left + _GRACE)
        socket.send_fds(helper, [self._handler.order(max(1, round(left)))], [turn.core])
        word, _, number = helper.recv(64).decode("ascii", "replace").strip().partition(" ")
        match word:
            case "exit" if number == "0":
                return "done", ""
            case "deadline":
                return "timed_out", f"killed after {left:.0f} s (CRASHBUS_RECORDER_CHAIN_DEADLINE)"
            case "error" if number.isdecimal():
                return "failed", f"cannot be started: {os.strerror(int(number))}"
            case _:
                return "failed", f"{word} {number}".strip() or "the pipe helper was killed"

    def _end(self, crash_id: str, result: str, why: str = "") -> None:
        metrics.CHAINED.labels(result).inc()
        said = log.info if result == "done" else log.warning
        said(
            "the former handler of cores had its turn",
            crash_id=crash_id,
            handler=self._handler.program,
            result=result,
            why=why,
        )
