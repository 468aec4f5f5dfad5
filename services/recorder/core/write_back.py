"""Having the disk write what is final of a large core while the rest of it is copied.

What is written costs no more than a copy in memory until so much waits for the disk that the kernel
throttles who writes (vm.dirty_ratio), and by itself the disk begins only at half of that
(vm.dirty_background_ratio): a core of gigabytes is held for what could have been written by then.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

from services.common.proc import LIVE, lines
from services.recorder.core.core_memory import PAGE

NAME = "write back"
_AT_ONCE = 32 * 1024 * 1024  # bytes
_WRITE = 2  # SYNC_FILE_RANGE_WRITE, sync_file_range(2): begin, and do not wait for the end
_MAX_VMSTAT = 64 * 1024  # bytes

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


@contextmanager
def following(core: int, size: int) -> Iterator[Callable[[int], None]]:
    """Give whom to tell up to where a core is final, while it is copied.

    Args:
        core: the file's descriptor.
        size: in bytes.
    """
    write_back = _begun(core, size)
    if write_back is None:
        yield lambda _: None
        return
    try:
        yield write_back.follow
    finally:
        write_back.close()


def _begun(core: int, size: int) -> "_WriteBack | None":
    # Without it the copy only takes longer: no /proc/vmstat, descriptor or thread can be had.
    with suppress(LookupError, OSError, RuntimeError):
        return _WriteBack(core) if size >= _AT_ONCE and _pays(size) else None
    return None


def _pays(size: int) -> bool:
    """Tell whether the disk would begin by itself before so many bytes are written."""
    pages = dict(line.split(b" ", 1) for line in lines(LIVE.read("vmstat", _MAX_VMSTAT)))
    begins_at = int(pages[b"nr_dirty_background_threshold"])
    return size // PAGE + int(pages[b"nr_dirty"]) > begins_at


class _WriteBack:
    """Has a file written back in a thread of its own, which alone waits for the disk."""

    def __init__(self, core: int) -> None:
        self._asked = 0  # bytes
        self._ends: SimpleQueue[int | None] = SimpleQueue()
        # Opened anew, because a dead disk may keep it longer than the core's own descriptor.
        file = os.open(f"/proc/self/fd/{core}", os.O_RDONLY | os.O_CLOEXEC)
        thread = threading.Thread(target=self._run, args=(file,), name=NAME, daemon=True)
        try:
            thread.start()
        except BaseException:
            os.close(file)
            raise

    def follow(self, end: int) -> None:
        """Have all before `end` (bytes) written, if that is worth a call."""
        if end - self._asked >= _AT_ONCE:
            self._asked = end
            self._ends.put(end)

    def close(self) -> None:
        """Wait for nothing: what was asked for is begun all the same."""
        self._ends.put(None)

    def _run(self, file: int) -> None:
        begun = 0
        try:
            while (end := self._ends.get()) is not None:
                _write(file, begun, end)
                begun = end
        finally:
            os.close(file)


def _write(file: int, begin: int, end: int) -> None:
    _libc.sync_file_range(file, begin, end - begin, _WRITE)
