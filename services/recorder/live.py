"""A living process, held for a moment so that it can be looked at like one that crashed.

Its threads are stopped with ptrace(2), PTRACE_SEIZE, which sends it no signal: what it waits for
goes on, but for the system calls that end with EINTR after any stop, such as epoll_wait(2), see
signal(7). The head of a core is made of what is seen, in the form in which the kernel writes it
(fs/binfmt_elf.c), so that all else is done as for a crash.
"""

import ctypes
import os
import platform
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from services.common import proc
from services.recorder import facts
from services.recorder.core.registers import AARCH64, X86_64
from services.recorder.errors import CaptureFailed
from services.recorder.handover.hold import Hold

_MACHINES = {"x86_64": X86_64, "aarch64": AARCH64}
_REGISTERS = {X86_64: 216, AARCH64: 272}  # bytes of pr_reg
_SLEEPS_FOR = 0.05  # seconds; a thread in an uninterruptible sleep for as long is not waited for
_STOP_WITHIN = 2.0  # seconds for the others, which may wait for a processor
_LOOK_AGAIN = 0.0005  # seconds
_LOOK_FOR_LATE = 0.005  # seconds
_PAGE = 4096

_PTRACE_DETACH, _GETREGSET, _SEIZE, _INTERRUPT = 17, 0x4204, 0x4206, 0x4207
_EVENT_STOP = 128
_WALL = 0x40000000
_NT_PRSTATUS, _NT_PRFPREG, _NT_AUXV, _NT_FILE = 1, 2, 6, 0x46494C45
_PT_LOAD, _PT_NOTE = 1, 4
_FLAGS = ((4, "r"), (2, "w"), (1, "x"))  # p_flags
_ET_CORE = 4
_MAX_HEADERS = 0xFFFE
_MOST_NOTES = 16
_MAX_SMAPS = 64 * 1024 * 1024  # bytes

T = TypeVar("T")


class _Mapping(NamedTuple):
    start: int
    end: int
    access: str
    offset: int
    device: bytes
    path: bytes

    @property
    def size(self) -> int:
        return self.end - self.start


class LiveHold(Hold):
    """A hold on a living process; letting go lets it run on.

    Raises:
        CaptureFailed: there is no such process, or it cannot be stopped.

    Attributes:
        notes: which threads were not stopped.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._tracer = _Tracer()
        self._stopped: dict[int, int] = {}  # thread to the signal that waits for it
        self._late: set[int] = set()  # threads that stop when they wake up
        self._ended: set[int] = set()  # threads that are listed until all have ended
        self.notes: list[str] = []
        changed = _changed_mappings(facts.living_task(pid))  # long to read: before it is held
        content = os.memfd_create("core head", os.MFD_CLOEXEC)
        super().__init__(content, patience=1.0)
        try:
            self._tracer.do(self._stop_threads)
            head = self._tracer.do(lambda: _head(pid, tuple(self._stopped), changed))
            os.write(content, head)
            os.lseek(content, 0, os.SEEK_SET)
        except BaseException:
            self.close()
            raise

    def let_go(self, because: str | None = None) -> None:
        """Let the process run on."""
        if not self.is_held:
            return
        self._tracer.do(self._detach)
        super().let_go(because)
        if self._late:
            self._tracer.begin(self._detach_late)  # which takes as long as it takes

    def _detach(self) -> None:
        for thread, number in self._stopped.items():
            with suppress(OSError):  # it was killed meanwhile
                _ptrace(_PTRACE_DETACH, thread, 0, number)
        self._stopped = {}

    def _detach_late(self) -> None:
        """Let each thread run on that stops only now; all others run already."""
        while self._late:
            self._late -= {thread for thread in self._late if self._has_stopped(thread)}
            self._detach()
            time.sleep(_LOOK_FOR_LATE)

    def _stop_threads(self) -> None:
        """Stop all threads; those that are started meanwhile too."""
        began = time.monotonic()
        waiting: set[int] = set()
        while time.monotonic() - began < _STOP_WITHIN:
            new = _threads(self._pid) - self._stopped.keys() - self._ended - waiting
            for thread in new:
                if self._seize(thread):
                    waiting.add(thread)
            waiting -= {thread for thread in waiting if self._has_stopped(thread)}
            if not new and not waiting:
                break
            if time.monotonic() - began > _SLEEPS_FOR:
                waiting = {thread for thread in waiting if not self._has_ended(thread)}
                if all(map(self._sleeps, waiting)):
                    break
            if not new:
                time.sleep(_LOOK_AGAIN)
        self._late = waiting
        self.notes = [
            f"thread {thread} was not stopped: {_state(self._pid, thread)}"
            for thread in sorted(waiting)[:_MOST_NOTES]
        ]
        if not self._stopped:
            raise self._not_stopped()

    def _not_stopped(self) -> CaptureFailed:
        if self._ended and not self._late:
            text = f"process {self._pid} has ended, and stays until its parent asks for its status"
            mend = "nothing of it is left but that: see to its parent, PPID in ps -l"
        else:
            text, mend = f"no thread of process {self._pid} stops", "see its state in ps"
        return CaptureFailed("process_gone", text, mend)

    def _seize(self, thread: int) -> bool:
        try:
            _ptrace(_SEIZE, thread, 0, 0)
            _ptrace(_INTERRUPT, thread, 0, 0)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            # The kernel says so of one that has ended, too, ptrace_attach() in kernel/ptrace.c.
            if self._has_ended(thread):
                return False
            raise CaptureFailed(
                "capture_failed",
                f"process {self._pid} cannot be stopped: {error.strerror}",
                "be root, end the debugger that traces it, and see whether it is a kernel thread",
            ) from error
        return True

    def _has_ended(self, thread: int) -> bool:
        if _state(self._pid, thread)[0] not in "XZ":
            return False
        self._ended.add(thread)
        return True

    def _sleeps(self, thread: int) -> bool:
        return _state(self._pid, thread).startswith("D")

    def _has_stopped(self, thread: int) -> bool:
        """Tell whether a thread needs no more waiting for: it stopped, or ended."""
        try:
            found, status = os.waitpid(thread, _WALL | os.WNOHANG)
        except ChildProcessError:
            return True
        if not found:
            return False
        if os.WIFSTOPPED(status):
            is_ours = status >> 16 == _EVENT_STOP
            # A signal that was on its way is delivered when it runs on.
            self._stopped[thread] = 0 if is_ours else os.WSTOPSIG(status)
        return True


class _Tracer:
    """A thread of its own for ptrace(2), which knows only the one that began.

    A daemon: a thread that never wakes up must not keep this process; the kernel detaches then.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="tracer", daemon=True).start()

    def do(self, call: Callable[[], T]) -> T:
        """Return what a call returns in that thread."""
        return self.begin(call).result()

    def begin(self, call: Callable[[], T]) -> "Future[T]":
        """Have something called there, after all that was begun before."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                future.set_exception(error)


def process_of(task: int) -> int | None:
    """Return the process that a thread is of, itself if it is the first; None: there is none."""
    with suppress(OSError):
        for line in proc.lines(Path(f"/proc/{task}/status").read_bytes()):
            if line.startswith(b"Tgid:"):
                return int(line.split()[1])
    return None


def _state(pid: int, thread: int) -> str:
    """Return a thread's state as proc_pid_status(5) has it, such as ``D (disk sleep)``."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/task/{thread}/status").read_bytes()
        for line in proc.lines(status):
            if line.startswith(b"State:"):
                return line.partition(b":")[2].strip().decode("ascii", "replace")
    return "X (dead)"


def _threads(pid: int) -> set[int]:
    try:
        found = {int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()}
    except OSError:
        found = set()
    if not found:
        raise CaptureFailed("process_gone", f"there is no process {pid}", "see ps for its PID")
    return found


def _ptrace(request: int, pid: int, address: int, data: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, pid, address, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _register_set(thread: int, kind: int) -> bytes:
    room = ctypes.create_string_buffer(4096)
    vector = _Vector(ctypes.addressof(room), len(room))
    try:
        _ptrace(_GETREGSET, thread, kind, ctypes.addressof(vector))
    except OSError:
        return b""
    return room.raw[: vector.size]


def _changed_mappings(task: int) -> set[int]:
    """Return where mappings of files begin that have pages of the process's own."""
    changed, start = set(), 0
    try:
        with Path(f"/proc/{task}/smaps").open("rb") as smaps:
            for line in proc.lines(smaps.read(_MAX_SMAPS)):
                first, _, rest = line.partition(b" ")
                if first in (b"Anonymous:", b"Swap:") and not rest.strip().startswith(b"0 "):
                    changed.add(start)
                elif b"-" in first:
                    start = int(first.partition(b"-")[0], 16)
    except OSError:
        return set()
    return changed


def _mappings(task: int) -> Iterator[_Mapping]:
    try:
        maps = Path(f"/proc/{task}/maps").read_bytes()
    except OSError:
        return
    for one in proc.mappings(maps):
        device = b"" if one.inode == b"0" else one.device
        yield _Mapping(one.start, one.end, one.access.decode(), one.offset, device, one.path)


def _dumped(one: _Mapping, changed: set[int]) -> int:
    """Return how many bytes of a mapping belong into a core: vma_dump_size(), fs/coredump.c."""
    if one.path in (b"[vvar]", b"[vvar_vclock]", b"[vsyscall]") or one.access.startswith("---"):
        return 0
    is_file = bool(one.device) and not one.path.startswith((b"/dev/zero", b"/memfd:", b"/SYSV"))
    if not is_file or (one.access[3] == "p" and (one.access[1] == "w" or one.start in changed)):
        return one.size
    return _PAGE if one.offset == 0 and one.access[0] == "r" and _may_be_elf(one) else 0


def _may_be_elf(one: _Mapping) -> bool:
    """Tell by its name: to read the page could wait for whoever serves the file."""
    return one.access[3] == "p" and one.path.startswith(b"/") and one.size >= _PAGE


def _head(pid: int, threads: tuple[int, ...], changed: set[int]) -> bytes:
    """Return ELF header, program headers and notes of a core, up to where memory begins; empty
    where this machine's processes of that kind are not known (32-bit ones).
    """
    machine = _MACHINES.get(platform.machine(), 0)
    first = pid if pid in threads else threads[0]
    ordered = (first, *sorted(set(threads) - {first}))
    registers = {thread: _register_set(thread, _NT_PRSTATUS) for thread in ordered}
    if len(registers[first]) != _REGISTERS.get(machine):
        return b""
    mappings = list(_mappings(first))[: _MAX_HEADERS - 1]
    notes = b"".join(_notes(pid, ordered, registers, mappings))
    begin = 64 + 56 * (len(mappings) + 1)
    place = -(-(begin + len(notes)) // _PAGE) * _PAGE
    headers = [struct.pack("<IIQQQQQQ", _PT_NOTE, 0, begin, 0, 0, len(notes), 0, 4)]
    start = place
    for one in mappings:
        size = _dumped(one, changed)
        flags = sum(
            bit for bit, letter in zip((4, 2, 1), "rwx", strict=True) if letter in one.access
        )
        headers.append(
            struct.pack("<IIQQQQQQ", _PT_LOAD, flags, place, one.start, 0, size, one.size, _PAGE)
        )
        place += size
    elf = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    elf += struct.pack(
        "<HHIQQQIHHHHHH", _ET_CORE, machine, 1, 0, 64, 0, 0, 64, 56, len(headers), 0, 0, 0
    )
    return (elf + b"".join(headers) + notes).ljust(start, b"\0")


def _notes(
    pid: int, threads: tuple[int, ...], registers: dict[int, bytes], mappings: list[_Mapping]
) -> Iterator[bytes]:
    """Give the notes: those of the process behind the first thread's status."""
    for number, thread in enumerate(threads):
        if not registers[thread]:
            continue
        # struct elf_prstatus: siginfo, cursig, two signal sets, four IDs, four times.
        status = struct.pack("<iiihxxQQiiii", 0, 0, 0, 0, 0, 0, _ns_tid(pid, thread), 0, 0, 0)
        yield _note(_NT_PRSTATUS, status.ljust(112, b"\0") + registers[thread] + bytes(8))
        if not number:
            with suppress(OSError):
                yield _note(_NT_AUXV, Path(f"/proc/{thread}/auxv").read_bytes())
            yield _note(_NT_FILE, _files(mappings))
        floating = _register_set(thread, _NT_PRFPREG)
        if floating:
            yield _note(_NT_PRFPREG, floating)


def _ns_tid(pid: int, thread: int) -> int:
    with suppress(OSError, StopIteration):
        for line in proc.lines(Path(f"/proc/{pid}/task/{thread}/status").read_bytes()):
            if line.startswith(b"NSpid:"):
                return int(line.split()[-1])
    return thread


def _files(mappings: list[_Mapping]) -> bytes:
    """Return NT_FILE: count and page size, the ranges, the names."""
    files = [one for one in mappings if one.device]
    ranges = [(one.start, one.end, one.offset // _PAGE) for one in files]
    body = struct.pack("<QQ", len(files), _PAGE)
    body += b"".join(struct.pack("<QQQ", *one) for one in ranges)
    return body + b"".join(one.path.removesuffix(b" (deleted)") + b"\0" for one in files)


def _note(kind: int, body: bytes) -> bytes:
    padded = body + bytes(-len(body) % 4)
    return struct.pack("<III", 5, len(body), kind) + b"CORE\0\0\0\0" + padded
