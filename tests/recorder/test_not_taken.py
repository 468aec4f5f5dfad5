"""What cannot be read at once, or not for sure, stays held as it came; and the bounds of it."""

import errno
import gc
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from mmap import mmap
from pathlib import Path

import pytest

from crashbus.identity import boot_id, crash_id
from services.common.mounts import Mounts
from services.common.proc import LIVE
from services.common.unrecorded import Unrecorded, is_unrecorded
from services.recorder import facts
from services.recorder.core import core_head
from services.recorder.errors import CaptureFailed
from services.recorder.handover.hold import Hold
from services.recorder.taker import taker_library, taking
from services.recorder.taker.taken import Taken
from services.recorder.taker.taker_library import Crash
from services.recorder.taker.taking import Taker
from tests.recorder.test_taking import open_files, taker

__all__ = ("taker",)

KIB = 1024
MIB = 1024 * KIB
STATUS = bytes(336)  # struct elf_prstatus on x86-64
REQUEST = struct.pack("=IIQ", 16, 16, 0xF)


class Waiting:
    """A living process that waits, held, and the head of a core of its stack.

    Args:
        status: content of the core's NT_PRSTATUS.
        known: whether the hold has its pidfd.
    """

    def __init__(self, status: bytes, *, known: bool) -> None:
        self.process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"x")
        self.process.stdin.flush()
        assert self.process.stdout.read(1) == b"x"  # it has come to its loop
        self.pid = self.process.pid
        self.head = self._head(struct.pack("=III8s", 5, len(status), 1, b"CORE") + status)
        ours, self.kernels = socket.socketpair()
        self.kernels.sendall(self.head)
        self.hold = Hold(ours.detach(), 20)
        if known:
            self.hold.belongs_to(os.pidfd_open(self.pid))

    def _head(self, notes: bytes) -> bytes:
        maps = Path(f"/proc/{self.pid}/maps").read_text()
        stack = next(line for line in maps.splitlines() if line.endswith("[stack]"))
        start, end = (int(bound, 16) for bound in stack.split()[0].split("-"))
        size, notes_at = end - start, 64 + 2 * 56
        ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
        return b"".join(
            (
                ident + struct.pack("=HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0),
                struct.pack("=IIQQQQQQ", 4, 0, notes_at, 0, 0, len(notes), 0, 4),
                struct.pack("=IIQQQQQQ", 1, 6, notes_at + len(notes), start, 0, size, size, 1),
                notes,
            )
        )

    def end(self) -> None:
        self.hold.close()
        self.kernels.close()
        self.process.communicate()


@contextmanager
def waiting(status: bytes = STATUS, *, known: bool = True) -> Iterator[Waiting]:
    one = Waiting(status, known=known)
    try:
        yield one
    finally:
        one.end()


def take(taker: Taker, one: Waiting) -> Taken:
    return taker.take(one.pid, one.hold, 0, 64)


def is_as_it_came(taken: Taken, one: Waiting) -> bool:
    """Tell whether the process is held, and everything can be read as if nothing had been."""
    return (
        not any((taken.head, taken.memory, taken.resources, taken.code, taken.files))
        and not taken.give_back
        and not taken.proc._files
        and one.hold.is_held
        and one.hold.read_exactly(len(one.head)) == one.head
    )


def room_there() -> int:
    """Return how many bytes of what crashes are read to are there: proc_pid_status(5)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("\nRssShmem:")[2].split()[0]) * KIB


def no_memory(*_: object) -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def too_long(taker: Taker, hold: Hold) -> Callable[[Crash, Taken], mmap | None]:
    """Give room while the process is let go, by who looks after those that wait."""
    room = taker._room

    def let_go_meanwhile(crash: Crash, taken: Taken) -> mmap | None:
        hold.let_go("it waited too long")
        return room(crash, taken)

    return let_go_meanwhile


def test_process_without_a_pidfd_stays_as_it_came(taker: Taker) -> None:
    with waiting(known=False) as one:
        assert is_as_it_came(take(taker, one), one)


def test_process_whose_core_has_a_strange_head_stays_as_it_came(taker: Taker) -> None:
    with waiting(b"too short") as one:
        assert is_as_it_came(take(taker, one), one)


def test_process_that_could_not_be_named_stays_as_it_came(
    taker: Taker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taker_library._WANTED[0], "name", b"absent")  # instead of stat
    with waiting() as one:
        assert is_as_it_came(take(taker, one), one)


def test_process_that_was_let_go_meanwhile_is_not_taken(
    taker: Taker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting() as one:
        monkeypatch.setattr(taker, "_room", too_long(taker, one.hold))
        taken = take(taker, one)

        assert (taken.memory, taken.head) == (None, None)
        assert not one.hold.has_memory


@pytest.mark.parametrize(
    ("of", "what"),
    [(Mounts, "now"), (taking, "_new_room"), (Unrecorded, "begin")],
)
def test_error_meanwhile_leaves_a_process_as_it_came(
    taker: Taker, monkeypatch: pytest.MonkeyPatch, of: object, what: str
) -> None:
    with waiting() as other:  # of whose core nothing may come up
        taken = take(taker, other)
        assert taken.memory is not None
        taken.close()
    gc.collect()  # what an earlier test left open must not be closed meanwhile

    with waiting() as one, monkeypatch.context() as patch:
        opened = LIVE.list("self/fd", 10_000)
        patch.setattr(of, what, no_memory)
        if what == "_new_room":
            patch.setattr(taker, "_spare", [])
        assert is_as_it_came(take(taker, one), one)
        assert LIVE.list("self/fd", 10_000) == opened

    monkeypatch.setattr(taking, "AT_ONCE", 5 * MIB)  # so nothing is left that counts
    with waiting() as one:
        taken = take(taker, one)
        assert taken.memory is not None
        taken.close()
    assert taker._bytes == 0


def test_error_when_it_was_let_go_is_told_and_leaves_nothing_behind(
    taker: Taker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting() as one:
        program = Path(f"/proc/{one.pid}/exe").readlink()
        monkeypatch.setattr(core_head, "read", no_memory)
        name = crash_id(boot_id(), one.pid, facts.read_identity(one.pid, boot_id()).start_ticks)
        with pytest.raises(CaptureFailed, match="could not be kept: OSError") as failure:
            take(taker, one)
        assert failure.value.crash_id == name
        assert program not in open_files(os.getpid())
        assert not is_unrecorded(tmp_path / "spool", one.pid)
    assert taker._bytes == 0


def test_room_for_what_waits_to_be_written_is_bounded(
    taker: Taker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = room_there()
    with ExitStack() as ends:
        taken = [take(taker, ends.enter_context(waiting())) for _ in range(8)]
        assert all(one.memory is not None for one in taken)
        assert room_there() - before < 6 * MIB
        assert taker._bytes >= 4 * MIB  # one is in a room of that size

        monkeypatch.setattr(taking, "AT_ONCE", taker._bytes)
        late = ends.enter_context(waiting())
        assert is_as_it_came(take(taker, late), late)
        for one in taken:
            one.close()
        del one, taken
        assert taker._bytes == 0
        assert room_there() - before < 2 * MIB


def test_what_many_were_read_to_at_once_is_not_kept(taker: Taker) -> None:
    with waiting() as one, ExitStack() as together:
        crashes = [together.enter_context(taker._crash(one.hold)) for _ in range(6)]
        assert len({id(crash) for crash in crashes}) == 6

    assert len(taker._crashes) == 2
