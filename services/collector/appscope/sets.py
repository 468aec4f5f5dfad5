"""The sets of one process: seen, held open and judged, until they are in the spool."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from crashbus.layout import Kind
from crashbus.messages import SignalEvent
from services.collector import judge, metrics, processes, spool
from services.collector.appscope.bringing_out import BringingOut
from services.collector.appscope.inside import Unsafe, directory_inside
from services.collector.found import MAX_SMALL_FILE
from services.collector.judge import Verdict
from services.collector.spool import Entry, Refused
from services.common.crash_directory import SpoolUnusable

log: structlog.stdlib.BoundLogger = structlog.get_logger()

FOR_ROOM = 60.0  # seconds that a set waits for room on the disk before it is cut
_SETS_AT_ONCE = 16  # of one process, with their files open


@dataclass
class _Set:
    """One set inside the container, its files held open from the moment they are seen.

    Attributes:
        patient_until: time.monotonic() from which on it is cut rather than waits for room.
    """

    epoch: int
    entries: dict[Kind, Entry] = field(default_factory=dict)
    files: dict[Kind, int] = field(default_factory=dict)
    verdict: Verdict = Verdict.WAIT
    patient_until: float | None = None

    @property
    def is_patient(self) -> bool:
        return self.patient_until is None or time.monotonic() < self.patient_until

    def close(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()


class Watched:
    """The sets of one process in a container, to be copied to the spool.

    Args:
        reserve: percent of the spool's disk that cores leave free.
        step: called whenever something was done.
        brought_out: see `services.collector.appscope.notes.Note`.

    Attributes:
        alive: the process was, at the last look.
    """

    def __init__(
        self,
        event: SignalEvent,
        root: Path,
        reserve: float,
        step: Callable[[], None],
        brought_out: dict[int, bool],
    ) -> None:
        self._event = event
        self._bringing_out = BringingOut(event, root, reserve, step)
        self._sets: dict[int, _Set] = {}
        self._directory: int | None = None  # where the library writes, once it is there
        self.brought_out = brought_out
        self.alive = True

    def close(self) -> None:
        """Let the files go."""
        for one in self._sets.values():
            one.close()
        self._leave()

    def _leave(self) -> None:
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    def look(self) -> bool:
        """Open what is new and judge every set; False once the process has ended.

        Raises:
            Unsafe: that could take for ever.
        """
        process = self._event.process
        # In this order: what an ended process has written is then all seen.
        self.alive = alive = self._is_alive()
        if alive:
            self._enter()
        if self._directory is not None:
            with suppress(OSError):
                self._open_new(self._directory)
        held = spool.open_by_process(process.pid) if alive else set()
        for one in self._sets.values():
            cfg = one.files.get(Kind.CFG)
            head = os.pread(cfg, MAX_SMALL_FILE, 0) if cfg is not None else b""
            one.verdict = judge.judge_appscope(
                present=one.files.keys(),
                held_open={k for k, entry in one.entries.items() if entry.identity in held},
                promised=judge.promised_kinds(head),
                process_alive=alive,
            )
        return alive

    def _is_alive(self) -> bool:
        return processes.is_alive(self._event.process.pid, self._event.process.start_ticks)

    def _enter(self) -> None:
        """Open the library's directory anew: at first there is none.

        Once the process has ended, its PID may be another's, whose root is not looked into.
        """
        process = self._event.process
        with suppress(OSError), directory_inside(process.pid, process.ns_pid) as directory:
            if self._is_alive():
                opened = os.dup(directory)  # where no descriptor is left, the former one stays
                self._leave()
                self._directory = opened

    def _open_new(self, directory: int) -> None:
        for epoch, entries in spool.list_directory(directory).sets.items():
            # Older ones are of another process that had this PID in this container.
            if self.brought_out.get(epoch) or epoch < int(self._event.time) - 1:
                continue
            if len(self._sets) >= _SETS_AT_ONCE and epoch not in self._sets:
                continue
            one = self._sets.setdefault(epoch, _Set(epoch))
            for kind, entry in entries.items():
                if kind not in one.files and kind is not Kind.CAPTURE:
                    self._open(one, entry, directory)

    def _open(self, one: _Set, entry: Entry, directory: int) -> None:
        try:
            descriptor = spool.open_file(entry.name, directory, self._event.process.uid)
        except FileNotFoundError:
            return
        except Refused as error:
            if entry.kind not in one.entries:
                one.entries[entry.kind] = entry  # refused once, said once
                metrics.REFUSED.labels("in_container").inc()
                log.warning("refused", crash_id=self._event.crash_id, error=str(error))
            return
        one.files[entry.kind], one.entries[entry.kind] = descriptor, entry

    @property
    def has_whole(self) -> bool:
        """Whether a set is whole and not in the spool yet."""
        return any(one.verdict is Verdict.WHOLE for one in self._left())

    def copy_whole(self) -> bool:
        """Copy the sets that are whole to the spool; tell whether one was.

        What cannot be copied yet is left for the next call.
        """
        before = len(self._left())
        self._copy([one for one in self._left() if one.verdict is Verdict.WHOLE])
        return len(self._left()) < before

    def copy_rest(self) -> bool:
        """Copy what is left of a process that has ended; tell whether some of it waits for room."""
        self._copy(self._left())
        return any(one.is_patient for one in self._left())

    def keep(self) -> None:
        """Copy what is still left, as far as there is room; of a living process what is whole.

        Raises:
            OSError, SpoolUnusable: of an ended process's set nothing could be kept; all others
                were tried.
        """
        if self.alive:
            with suppress(Unsafe):
                self.look()
        lost: list[OSError | SpoolUnusable] = []
        for one in self._left():
            if self.alive and one.verdict is not Verdict.WHOLE:
                continue
            try:
                self._copy_set(one, as_far_as_possible=True)
            except (OSError, SpoolUnusable) as error:
                lost.append(error)
        if lost and not self.alive:
            raise lost[0]

    def _left(self) -> list[_Set]:
        return [one for one in self._sets.values() if one.files]

    def _copy(self, sets: list[_Set]) -> None:
        for one in sets:
            try:
                self._copy_set(one, as_far_as_possible=not one.is_patient)
            except (OSError, SpoolUnusable) as error:
                if one.patient_until is None:
                    one.patient_until = time.monotonic() + FOR_ROOM
                    crash_id = self._event.crash_id
                    log.warning("not brought out yet", crash_id=crash_id, error=str(error))

    def _copy_set(self, one: _Set, as_far_as_possible: bool) -> None:
        """Copy one set, and be done with it.

        Raises:
            OSError, SpoolUnusable: it could not be copied; nothing of it is in the spool.
        """
        is_whole = one.verdict is Verdict.WHOLE
        uncut = self._bringing_out.copy_set(one.epoch, one.files, is_whole, as_far_as_possible)
        one.close()
        del self._sets[one.epoch]
        # What we cut when we are stopped may have room when we are back.
        self.brought_out[one.epoch] = uncut or not one.is_patient
        if len(self.brought_out) > spool.MAX_ENTRIES:  # of more the older are not listed
            del self.brought_out[min(self.brought_out)]
