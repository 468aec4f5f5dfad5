"""AppScope's files inside a container: brought out while the process still lives.

Its library writes to ``/tmp/appscope/<pid>`` below the process's own root, where nobody
outside looks and which is gone with the container. After the core it sleeps for two seconds;
in that time the files are copied to the spool, with a capture record, and are from then on
like any other set. Nothing is written inside the container.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from crashbus import capture, layout
from crashbus.capture import CapturedFile, CaptureRecord
from crashbus.layout import Kind
from crashbus.messages import SignalEvent
from services.collector import judge, metrics, processes, spool
from services.collector.judge import Verdict
from services.collector.spool import Entry, Refused
from services.common import crash_directory
from services.common.crash_directory import SpoolUnusable

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_AGAIN = 0.05  # seconds between looks while a set is being written
LOOK_IDLY = 1.0  # seconds, later: the library pauses for two after each core
WRITING = 10.0  # seconds after a signal in which its set may still be written
AT_ONCE = 256  # processes watched at a time; more are told in the log
_BLOCK = 1024 * 1024
_SETS_AT_ONCE = 16  # of one process, with their files open
_INSIDE = ("tmp", "appscope")


class Containers:
    """Watches the processes in containers whose signals AppScope's library handles.

    A process that recovers is watched until it ends: it may write a set for each signal, of
    which the detector publishes but the first.

    Args:
        root: the spool.
    """

    def __init__(self, root: Path, host: str) -> None:
        self._root = root
        self._host = host
        self._watches: dict[str, asyncio.Task[None]] = {}

    def watch(self, event: SignalEvent) -> None:
        """Bring out every set that the process of this event writes from now on."""
        crash_id = event.crash_id
        if crash_id in self._watches or not _has_own_root(event.process.pid):
            return
        if len(self._watches) >= AT_ONCE:
            metrics.REFUSED.labels("too_many_containers").inc()
            log.error("too many processes under AppScope crash at once", crash_id=crash_id)
            return
        task = asyncio.create_task(self._bring_out(event), name=f"container {crash_id}")
        self._watches[crash_id] = task
        task.add_done_callback(lambda _: self._watches.pop(crash_id, None))

    def stop(self) -> None:
        """Watch no longer; what is not brought out yet is, when the collector runs again and
        the process still lives."""
        for task in self._watches.values():
            task.cancel()

    async def _bring_out(self, event: SignalEvent) -> None:
        with _Watched(event) as watched:
            busy_until = time.monotonic() + WRITING
            while await asyncio.to_thread(watched.look):
                try:
                    if await asyncio.to_thread(watched.copy_whole, self._root, self._host):
                        busy_until = time.monotonic()
                except (OSError, SpoolUnusable) as error:
                    log.warning("not brought out yet", crash_id=event.crash_id, error=str(error))
                busy = time.monotonic() < busy_until
                await asyncio.sleep(LOOK_AGAIN if busy else LOOK_IDLY)
            try:
                await asyncio.to_thread(watched.copy_rest, self._root, self._host)
            except (OSError, SpoolUnusable) as error:
                metrics.REFUSED.labels("not_brought_out").inc()
                log.error("lost with its container", crash_id=event.crash_id, error=str(error))


def _has_own_root(pid: int) -> bool:
    """Tell whether a process has another root than the host's first process.

    Where that may not be looked at, we are no container ourselves and our root is the host's.
    """
    try:
        own = Path(f"/proc/{pid}/root/.").stat()
    except OSError:
        return False
    try:
        host = Path("/proc/1/root/.").stat()
    except OSError:
        host = Path("/").stat()
    return (own.st_dev, own.st_ino) != (host.st_dev, host.st_ino)


@dataclass
class _Set:
    """One set inside the container, its files held open from the moment they are seen."""

    epoch: int
    entries: dict[Kind, Entry] = field(default_factory=dict)
    files: dict[Kind, int] = field(default_factory=dict)
    verdict: Verdict = Verdict.WAIT

    def close(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()


class _Watched:
    """The sets of one process in a container."""

    def __init__(self, event: SignalEvent) -> None:
        self._event = event
        self._sets: dict[int, _Set] = {}
        self._done: set[int] = set()

    def __enter__(self) -> "_Watched":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sets.values():
            one.close()

    def look(self) -> bool:
        """Open what is new and judge every set; False once the process has ended."""
        process = self._event.process
        # In this order: what an ended process has written is then all seen.
        alive = processes.is_alive(process.pid, process.start_ticks)
        with suppress(OSError), _directory_inside(process.pid, process.ns_pid) as directory:
            self._open_new(directory)
        held = spool.open_by_process(process.pid) if alive else set()
        for one in self._sets.values():
            cfg = one.files.get(Kind.CFG)
            promised = judge.promised_kinds(os.pread(cfg, _BLOCK, 0)) if cfg is not None else None
            one.verdict = judge.judge_appscope(
                present=one.files.keys(),
                held_open={k for k, entry in one.entries.items() if entry.identity in held},
                promised=promised,
                process_alive=alive,
            )
        return alive

    def _open_new(self, directory: int) -> None:
        for epoch, entries in spool.list_directory(directory).sets.items():
            # Older ones are of another process that had this PID in this container.
            if epoch in self._done or epoch < int(self._event.time) - 1:
                continue
            if len(self._sets) >= _SETS_AT_ONCE and epoch not in self._sets:
                continue
            one = self._sets.setdefault(epoch, _Set(epoch))
            for kind, entry in entries.items():
                if kind not in one.files and kind is not Kind.CAPTURE:
                    self._open(one, entry, directory)

    def _open(self, one: _Set, entry: Entry, directory: int) -> None:
        try:
            if entry.uid != self._event.process.uid:
                raise Refused("foreign_owner", f"{entry.name!r} belongs to UID {entry.uid}")
            descriptor = spool.open_file(entry.name, directory)
        except FileNotFoundError:
            return
        except Refused as error:
            if entry.kind not in one.entries:
                one.entries[entry.kind] = entry  # refused once, said once
                metrics.REFUSED.labels("in_container").inc()
                log.warning("refused", crash_id=self._event.crash_id, error=str(error))
            return
        one.files[entry.kind], one.entries[entry.kind] = descriptor, entry

    def copy_whole(self, root: Path, host: str) -> bool:
        """Copy the sets that are whole to the spool; tell whether there was one."""
        return self._copy(
            [s for s in self._sets.values() if s.verdict is Verdict.WHOLE], root, host
        )

    def copy_rest(self, root: Path, host: str) -> None:
        """Copy what is left of a process that has ended."""
        self._copy([one for one in self._sets.values() if one.files], root, host)

    def _copy(self, sets: list[_Set], root: Path, host: str) -> bool:
        for one in sets:
            self._copy_set(one, root, host)
            one.close()
            del self._sets[one.epoch]
            self._done.add(one.epoch)
        return bool(sets)

    def _copy_set(self, one: _Set, root: Path, host: str) -> None:
        """Copy one set under a capture record."""
        pid = self._event.process.pid
        directory, epoch = crash_directory.open_crash(root, pid, one.epoch)
        whole = one.verdict is Verdict.WHOLE
        doubtful = set() if whole else judge.doubtful(one.files.keys())
        captured: dict[str, CapturedFile] = {}
        try:
            descriptor = capture.create(directory, epoch, self._record(host, "writing", {}))
            try:
                for kind, source in one.files.items():
                    captured[layout.crash_file_name(kind, epoch)] = CapturedFile(
                        size=_copy(source, directory, kind, epoch),
                        truncated=kind in doubtful,
                        note="its writer ended before it was whole" if kind in doubtful else None,
                    )
                capture.write(descriptor, self._record(host, "complete", captured))
            finally:
                os.close(descriptor)
        finally:
            os.close(directory)
        log.info("brought out of a container", crash_id=self._event.crash_id, files=len(captured))

    def _record(self, host: str, state: str, files: dict[str, CapturedFile]) -> CaptureRecord:
        event = self._event
        return CaptureRecord.model_validate(
            {
                "state": state,
                "crash_id": event.crash_id,
                "host": host,
                "crashed_at": event.time,
                "process": event.process,
                "signal": event.signal,
                "signal_name": event.signal_name,
                "code": event.code,
                "code_meaning": event.code_meaning,
                "fault_address": event.fault_address,
                "files": files,
                "notes": ("written by AppScope's library inside its container",),
            }
        )


@contextmanager
def _directory_inside(pid: int, ns_pid: int) -> Iterator[int]:
    """Open ``/tmp/appscope/<pid>`` below a process's root, component by component."""
    with ExitStack() as stack:
        # The magic link leads to the process's root; below it no link is followed.
        current = os.open(f"/proc/{pid}/root/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, current)
        for name in (*_INSIDE, str(ns_pid)):
            current = stack.enter_context(spool.open_directory(name, current))
        yield current


def _copy(source: int, directory: int, kind: Kind, epoch: int) -> int:
    target = crash_directory.create_file(directory, kind, epoch)
    with os.fdopen(target, "wb") as file:
        size = os.fstat(source).st_size
        done = 0
        while done < size and (block := os.pread(source, min(_BLOCK, size - done), done)):
            file.write(block)
            done += len(block)
    return done
