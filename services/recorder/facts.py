"""What is only there while the crashed process is held: its /proc, read and cut to size.

Sources: proc_pid_environ(5), proc_pid_limits(5), proc_pid_maps(5), proc_pid_map_files(5).
"""

import os
import pwd
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

from crashbus import names, signals
from crashbus.parts import Process
from services.common import process as processes
from services.common import redact, resources
from services.common.proc import LIVE, Proc, mappings
from services.common.resources import Resources
from services.recorder.core_head import Head
from services.recorder.errors import CaptureFailed

MAX_ENVIRONMENT = 128 * 1024  # bytes kept; 2 MiB are possible, execve(2)
MAX_THREADS = 4096
MAX_MAPS = 8 * 1024 * 1024  # bytes read of the mappings: about 80,000
MAX_MODULES = 1024
_LONGEST_INSTRUCTION = 15  # bytes, on x86
_NS_TID = re.compile(rb"^NSpid:.*?(\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Module:
    """A file that is mapped as code.

    Attributes:
        start: lowest address at which the file is mapped.
        end: highest address, exclusive.
        file: open descriptor of the very file, wherever its path leads; -1: not opened.
    """

    path: str
    start: int
    end: int
    file: int = -1


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
                os.close(module.file)


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
    task = _living_task(pid, proc)
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
    living = _living_task(process.pid, proc)
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


def _living_task(pid: int, proc: Proc) -> int:
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
        return pwd.getpwuid(uid).pw_name
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


@dataclass
class _Mapped:
    """The mappings of one file: where the first lies, and the end of the last, in hexadecimal."""

    start: bytes
    first_end: bytes
    end: bytes
    code: bool = False

    def told(self, path: bytes) -> tuple[str, int, int, str]:
        """Return what `parse_maps` does; map_files has no leading zeros, unlike maps."""
        start = int(self.start, 16)
        first = f"{start:x}-{int(self.first_end, 16):x}"
        return names.text(path), start, int(self.end, 16), first


# Lines of files, as proc_pid_maps(5) has them, one match for each; there may be 65,530 mappings and
# more, most of them memory, which is gone over without a match of its own: its inode is 0. (No
# group is possessive: Python before 3.11.5 gets that wrong.)
_FILE_MAPPING = re.compile(
    rb"(?:[^ \n]++ [^ \n]++ [^ \n]++ [^ \n]++ 0(?: [^\n]*+)?\n)*"
    rb"(?:([0-9a-f]++)-([0-9a-f]++) [r-][w-]([x-])[ps] [0-9a-f]++ "
    rb"([0-9a-f]++:[0-9a-f]++ [1-9][0-9]*+) ++([^\n]++)|[^\n]*+)\n?"
)


def parse_maps(raw: bytes) -> list[tuple[str, int, int, str]]:
    """Return path, start, end and the name in map_files of each file that is mapped as code.

    Args:
        raw: /proc/<pid>/maps, or its beginning, in the order of addresses.
    """
    files: dict[tuple[bytes, bytes], _Mapped] = {}
    for start, end, code, identity, path in _FILE_MAPPING.findall(raw):
        if not path:
            continue
        mapped = files.get((identity, path))
        if mapped is None:
            mapped = files[identity, path] = _Mapped(start, end, end)
        mapped.end = end
        mapped.code = mapped.code or code == b"x"
    found = (one.told(path) for (_, path), one in files.items() if one.code)
    return list(islice(found, MAX_MODULES))


def with_modules(facts: Facts, files: int, opened: Mapping[str, int] | None = None) -> Facts:
    """Add the modules, and open the files themselves, which path, root and deletion cannot hide.

    The last to be done: a file system that does not answer keeps us here.

    Args:
        files: how many descriptors may be opened.
        opened: what `open_modules` returned, if they are open already; what is of no use is closed.
    """
    if opened is None:
        opened = open_modules(facts.task, facts.maps, files)
    unused = dict(opened)
    try:
        found = parse_maps(facts.maps)
        modules = [Module(path, low, high, unused.pop(name, -1)) for path, low, high, name in found]
    finally:
        for file in unused.values():
            os.close(file)
    return replace(facts, modules=tuple(modules))


def open_modules(task: int, maps: bytes, limit: int) -> dict[str, int]:
    """Open the first files that are mapped as code, by name in proc_pid_map_files(5)."""
    opened: dict[str, int] = {}
    for *_, mapping in parse_maps(maps):
        if len(opened) >= limit:
            break
        file = open_mapping(task, mapping)
        if file >= 0:
            opened[mapping] = file
    return opened


def open_mapping(task: int, mapping: str) -> int:
    """Open a mapped file by its name in proc_pid_map_files(5); -1 where that cannot be."""
    path = f"/proc/{task}/map_files/{mapping}"
    try:
        # To open a device is to act on it: look first. What is mapped stays while it is held.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - fast, see services.common.proc
            return -1
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return -1


def _link(name: str, proc: Proc) -> str | None:
    path = proc.link(name)
    return None if path is None else names.text(path)
