"""What is only there while the crashed process is held: its /proc, read and cut to size.

Sources: proc_pid_environ(5), proc_pid_limits(5), proc_pid_maps(5).
"""

import os
import pwd
import re
from dataclasses import dataclass, field

from crashbus import names, signals
from crashbus.parts import Process
from services.common import process as processes
from services.common import redact, resources
from services.common.proc import LIVE, Proc, mappings
from services.common.resources import Resources
from services.recorder.core.core_head import Head
from services.recorder.errors import CaptureFailed
from services.recorder.modules import Module, close

MAX_ENVIRONMENT = 128 * 1024  # bytes kept; 2 MiB are possible, execve(2)
MAX_THREADS = 4096
MAX_MAPS = 8 * 1024 * 1024  # bytes read of the mappings: about 80,000
_LONGEST_INSTRUCTION = 15  # bytes, on x86
_NS_TID = re.compile(rb"^NSpid:.*?(\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """A thread.

    Attributes:
        tid: in the initial PID namespace.
        ns_tid: in its own, which is what its core shows.
    """

    tid: int
    ns_tid: int
    name: str


@dataclass(frozen=True)
class Facts:
    """A crashed process as it was.

    Attributes:
        raw_environment: up to `MAX_ENVIRONMENT` bytes, secrets and all: see `environment`.
        task: a thread that still has its memory, as a name in /proc.
        resources: what it had in use.
        maps: its mappings, proc_pid_maps(5), up to `MAX_MAPS` bytes: drop them soon.
    """

    process: Process
    username: str
    raw_environment: bytes = field(repr=False)
    cwd: str | None
    root: str | None
    limits: dict[str, str]
    threads: tuple[Task, ...]
    modules: tuple[Module, ...]
    notes: tuple[str, ...] = field(default=())
    maps: bytes = field(default=b"", repr=False)
    task: int = 0
    resources: Resources = field(default_factory=Resources, repr=False)

    @property
    def environment(self) -> tuple[str, ...]:
        """Its variables, secrets taken out: that takes longer than reading them."""
        entries = (names.text(entry) for entry in self.raw_environment.split(b"\0") if entry)
        return redact.environment(tuple(entries))

    @property
    def thread_names(self) -> dict[int, str]:
        """Names of the threads by the IDs that the core shows."""
        return {thread.ns_tid: thread.name for thread in self.threads}

    def close(self) -> None:
        """Close the modules' files."""
        for module in self.modules:
            if module.file >= 0:
                close(module.file)


def read_identity(pid: int, boot_id: str, proc: Proc = LIVE) -> Process:
    """Read who crashed.

    Raises:
        CaptureFailed: it is gone.
    """
    try:
        process = processes.read_process(pid, boot_id, proc)
    except ProcessLookupError as gone:
        raise CaptureFailed(
            "process_gone",
            f"{gone}, so its crash cannot be named",
            "nothing, if it was killed while it crashed (docker stop, OOM)",
        ) from gone
    task = living_task(pid, proc)
    if task != pid:
        process = process.model_copy(
            update={
                "executable": processes.executable(task, proc),
                "command_line": processes.command_line(task, proc),
            }
        )
    return process


def read_rest(process: Process, proc: Proc = LIVE, found: Resources | None = None) -> Facts:
    """Read everything else but the modules; what cannot be read is left out.

    Args:
        found: what it had in use, if that was read already.
    """
    living = living_task(process.pid, proc)
    environment, cut = whole_variables(read_environment(living, proc))
    return Facts(
        process=process,
        username=username(process.uid),
        raw_environment=environment,
        cwd=_link(f"{living}/cwd", proc),
        root=_link(f"{living}/root", proc),
        limits=parse_limits(names.text(proc.read(f"{living}/limits"))),
        threads=_threads(process, proc),
        modules=(),
        notes=(f"environment cut to {MAX_ENVIRONMENT} bytes",) if cut else (),
        maps=read_maps(living, proc),
        task=living,
        resources=found or resources.read(living, process.cgroup, proc),
    )


def code_at_fault(task: int, head: Head, maps: bytes) -> bytes | None:
    """Return the code at the program counter; None where the fault was not the instruction's."""
    at = head.program_counter
    return read_code(task, at, maps) if at is not None and is_at_fault(head) else None


def is_at_fault(head: Head) -> bool:
    """Tell whether the instruction at the program counter faulted."""
    cause = head.cause
    return cause is not None and signals.is_fault(cause.signal, cause.code or 0)


def read_code(task: int, address: int, maps: bytes) -> bytes:
    """Read the longest instruction that may stand at an address; empty where no code is.

    Args:
        maps: its mappings. Elsewhere than in code nothing is read: it may lie on a file system
            that does not answer.
    """
    end = _end_of_code(maps, address)
    try:
        memory = os.open(f"/proc/{task}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.pread(memory, min(_LONGEST_INSTRUCTION, end - address), address)
    except OSError:
        return b""
    finally:
        os.close(memory)


def _end_of_code(maps: bytes, address: int) -> int:
    """Return where the executable mapping at an address ends; the address if there is none."""
    ends = (one.end for one in mappings(maps) if one.start <= address < one.end and one.is_code)
    return next(ends, address)


def living_task(pid: int, proc: Proc = LIVE) -> int:
    """Return a thread that still has its memory, as a name in /proc; proc_tid(5).

    When the first thread has ended before the others, /proc/<pid> shows nothing of it.
    """
    if has_memory(pid, proc):
        return pid
    return next((task for task in read_threads(pid, proc) if has_memory(task, proc)), pid)


def has_memory(task: int, proc: Proc) -> bool:
    """Tell whether a thread has not ended yet."""
    return proc.link(f"{task}/exe") is not None


def read_threads(pid: int, proc: Proc) -> list[int]:
    """Return its threads, `MAX_THREADS` at most."""
    return [int(name) for name in proc.list(f"{pid}/task", MAX_THREADS)]


def read_maps(task: int, proc: Proc) -> bytes:
    """Return its mappings, as far as they are looked at."""
    return proc.read(f"{task}/maps", MAX_MAPS)


def read_environment(task: int, proc: Proc) -> bytes:
    """Return its environment, with a byte more than is kept if it has more."""
    return proc.read(f"{task}/environ", MAX_ENVIRONMENT + 1)


def whole_variables(raw: bytes) -> tuple[bytes, bool]:
    """Return the variables that have room in `MAX_ENVIRONMENT` bytes, and whether some have none.

    Args:
        raw: as `read_environment` returns it.
    """
    if len(raw) <= MAX_ENVIRONMENT:
        return raw, False
    # A variable that is cut in two could lose the name that tells it is a secret.
    return raw[:MAX_ENVIRONMENT].rpartition(b"\0")[0], True


def _threads(process: Process, proc: Proc) -> tuple[Task, ...]:
    other_namespace = process.ns_pid != process.pid
    return tuple(
        Task(
            task,
            _ns_tid(task, f"{process.pid}/task/{task}", proc) if other_namespace else task,
            names.text(proc.read(f"{process.pid}/task/{task}/comm").rstrip(b"\n")),
        )
        for task in read_threads(process.pid, proc)
    )


def _ns_tid(task: int, place: str, proc: Proc) -> int:
    """Return a thread's ID in its own PID namespace, the last of NSpid in proc_pid_status(5)."""
    match = _NS_TID.search(proc.read(f"{place}/status"))
    return int(match[1]) if match else task


def username(uid: int) -> str:
    """Return a user's name, or the UID where it has none on this host."""
    try:
        return names.text(os.fsencode(pwd.getpwuid(uid).pw_name))
    except KeyError:
        return str(uid)


def parse_limits(text: str) -> dict[str, str]:
    """Return ``{"Max open files": "1024 / 4096 files"}`` from /proc/<pid>/limits."""
    limits = {}
    for line in text.split("\n")[1:]:
        name, values = line[:26].strip(), line[26:].split()
        if name and len(values) >= 2:
            limits[name] = " / ".join(values[:2]) + (f" {values[2]}" if values[2:] else "")
    return limits


def _link(name: str, proc: Proc) -> str | None:
    path = proc.link(name)
    return None if path is None else names.text(path)
