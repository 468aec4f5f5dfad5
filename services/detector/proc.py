"""What /proc adds to an event, if the process is still there."""

from pathlib import Path

from crashbus import identity
from crashbus.parts import Process
from services.common.process import read_process
from services.detector.events import is_whole, joined, process_of
from services.detector.record import Record

_MAX_MAPS = 4 * 1024**2  # bytes; a process may have mapped 65,530 files to keep us busy


def describe(record: Record, boot_id: str) -> Process:
    """Return the process of a record, as whole as it can still be had."""
    kernel = process_of(record, boot_id)
    if is_whole(record):
        return kernel
    try:
        proc = read_process(record.pid, boot_id)
    except OSError:  # gone, most often
        return kernel
    # The PID may have been given to another process since.
    if record.start_boottime and proc.start_ticks != kernel.start_ticks:
        return kernel
    return joined(kernel, proc, record)


def handler_in_appscope(record: Record) -> bool:
    """Tell whether a handler lies in AppScope's library; False when the process is gone.

    AppScope's handler stays for two seconds, so there is time to look.
    """
    if not record.handler:
        return False
    name = _mapped_file(record.pid, record.handler)
    try:
        same = identity.start_ticks(record.pid) == record.start_ticks
    except OSError:
        return False
    return same and is_appscope(name)


def is_appscope(mapped_file: bytes | None) -> bool:
    """Tell whether a mapped file, as /proc/PID/maps names it, is AppScope's library.

    It is ``libscope.so`` in any directory (``/usr/lib/appscope/1.4.3/libscope.so``), maybe with
    a version behind it, maybe deleted or a memfd (``/memfd:libscope.so (deleted)``), where
    ``scope`` unpacks or attaches it.
    """
    base = (mapped_file or b"").rpartition(b"/")[2].removeprefix(b"memfd:")
    return base.startswith((b"libscope.so", b"libscope-"))


def _mapped_file(pid: int, address: int) -> bytes | None:
    """Return the name of what is mapped at an address, proc_pid_maps(5)."""
    read = 0
    try:
        with Path(f"/proc/{pid}/maps").open("rb") as maps:
            for line in maps:
                fields = line.rstrip(b"\n").split(maxsplit=5)
                start, _, end = fields[0].partition(b"-")
                if int(start, 16) <= address < int(end, 16):
                    return fields[5] if len(fields) > 5 else None
                read += len(line)
                if int(start, 16) > address or read > _MAX_MAPS:
                    return None
    except OSError:
        return None
    return None
