"""A core is copied whole, with holes, and as far as it goes."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.recorder.core import core_copy
from services.recorder.core.core_copy import BLOCK, Copied
from services.recorder.handover.hold import Hold

HEAD = b"head" * 16


class Kernel:
    """The other end of a hold."""

    def __init__(self) -> None:
        ours, self.socket = socket.socketpair()
        self.hold = Hold(ours.detach(), 0.2)
        self.broken: OSError | None = None

    def send(self, *parts: bytes, end: bool = True) -> None:
        def write() -> None:
            try:
                for part in parts:
                    self.socket.sendall(part)
                if end:
                    self.socket.shutdown(socket.SHUT_WR)
            except OSError as error:
                self.broken = error

        threading.Thread(target=write, daemon=True).start()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.hold.close()
    kernel.socket.close()


@pytest.fixture
def core(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "core", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def content(core: int) -> bytes:
    return os.pread(core, 64 << 20, 0)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"x"],
        [b"x" * (BLOCK - len(HEAD))],
        [os.urandom(3 * BLOCK + 17)],
        [bytes(5 * BLOCK)],
        [bytes(BLOCK), b"x", bytes(2 * BLOCK), b"y" * 100_000, bytes(BLOCK + 1)],
    ],
)
def test_copy_is_equal(kernel: Kernel, core: int, parts: list[bytes]) -> None:
    whole = HEAD + b"".join(parts)
    kernel.send(*parts)

    copied = core_copy.copy(kernel.hold, HEAD, len(whole), core, 0)

    assert copied == Copied(len(whole), streamed=True)
    assert content(core) == whole


def test_zeros_become_holes(kernel: Kernel, core: int) -> None:
    kernel.send(bytes(32 * BLOCK))

    core_copy.copy(kernel.hold, HEAD, None, core, 0)

    status = os.fstat(core)
    assert status.st_size == 32 * BLOCK + len(HEAD)
    assert status.st_blocks * 512 < BLOCK


def test_short_core_is_told(kernel: Kernel, core: int) -> None:
    kernel.send(b"x" * 1000)

    copied = core_copy.copy(kernel.hold, HEAD, 5000, core, 0)

    assert copied.size == len(HEAD) + 1000
    assert "3936 of 5000 bytes are missing" in (copied.fault or "")


def test_core_that_stands_still_is_given_up(kernel: Kernel, core: int) -> None:
    kernel.send(b"x" * 1000, end=False)

    copied = core_copy.copy(kernel.hold, HEAD, 5000, core, 0)

    assert copied.size == len(HEAD) + 1000
    assert "nothing came for" in (copied.fault or "")


def test_process_can_be_let_go_while_its_core_is_read(kernel: Kernel, core: int) -> None:
    kernel.send(b"x" * 1000, end=False)
    os.set_blocking(kernel.hold.descriptor, True)
    threading.Timer(0.05, kernel.hold.let_go, ["too old"]).start()

    copied = core_copy.copy(kernel.hold, HEAD, 5000, core, 0)

    assert copied.fault == (
        f"{5000 - copied.size} of 5000 bytes are missing: the recorder let it go: too old"
    )
    assert not kernel.hold.is_held
    with pytest.raises(OSError):
        for _ in range(2):
            kernel.socket.sendall(b"y")


@pytest.mark.parametrize("limit", [10, len(HEAD), 1000, BLOCK, BLOCK + 1])
def test_limit_cuts_to_the_byte(kernel: Kernel, core: int, limit: int) -> None:
    whole = HEAD + b"x" * (3 * BLOCK)
    kernel.send(whole[len(HEAD) :])

    copied = core_copy.copy(kernel.hold, HEAD, len(whole), core, limit)

    assert copied == Copied(limit, f"cut at the limit of {limit} bytes", streamed=True)
    assert content(core) == whole[:limit]


def test_core_of_just_the_limit_is_whole(kernel: Kernel, core: int) -> None:
    kernel.send(b"x" * 1000)

    copied = core_copy.copy(kernel.hold, HEAD, len(HEAD) + 1000, core, len(HEAD) + 1000)

    assert copied.fault is None
