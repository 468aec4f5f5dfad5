"""What CRASHBUS_RECORDER_COREDUMP_FILTER leaves out is what the kernel would have left out."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.recorder.core import core_copy, core_filter, core_head, core_pages
from services.recorder.core.core_copy import Copied
from services.recorder.core.core_head import Head
from services.recorder.core.core_memory import PagesUnreadable
from services.recorder.core.core_pages import Pages
from tests.recorder.conftest import MakeRecorder
from tests.recorder.test_capture import gdb
from tests.recorder.test_core_pages import Crash, coredump_socket
from tests.support.crashers import crasher
from tests.support.recorder import crash
from tests.support.requirements import need_program

__all__ = ["coredump_socket"]

MIB = 1024 * 1024
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
# None without bit 0, the stacks; DAX is memory of a kind that test machines lack.
MASKS = (0x1, 0x3, 0x5, 0x9, 0x11, 0x21, 0x41, 0x31, 0x33, 0x1FF)


@pytest.fixture(scope="module", autouse=True)
def huge_pages() -> Iterator[None]:
    """Room for two, which no other test asks for."""
    before = HUGE_PAGES.read_text()
    HUGE_PAGES.write_text(str(int(before) + 2))
    yield
    HUGE_PAGES.write_text(before)


def segments(head: Head) -> list[tuple[bytes, int, int, int]]:
    """Return each piece of memory: its header, where it is, and its size in core and memory."""
    return [
        (raw, load.address, load.size, memory)
        for raw, load, memory in head.segments()
        if load is not None
    ]


def core_head_of(listening: socket.socket, file: Path, own: int, mask: int | None) -> Head:
    """Crash a program with that filter of its own; return its core's head with `mask` applied."""
    need_program("setarch")
    died = Crash(listening, "setarch", "-R", crasher("kinds"), hex(own), file)
    try:
        if mask is None:
            return died.head
        return core_filter.narrowed(Pages(died.pid, died.head, died.maps), mask)
    finally:
        died.end()


@pytest.mark.parametrize("mask", MASKS, ids=hex)
def test_core_is_the_one_that_the_kernel_makes_for_this_filter(
    coredump_socket: socket.socket, tmp_path: Path, mask: int
) -> None:
    kernels = core_head_of(coredump_socket, tmp_path / "file", mask, None)

    ours = core_head_of(coredump_socket, tmp_path / "file", 0x1FF, mask)

    assert segments(ours) == segments(kernels)
    assert ours.size == kernels.size
    assert ours.as_sent().size == ours.as_sent().data + sum(
        load.size for load in ours.as_sent().loads()
    )


def test_filter_lets_in_no_more_than_the_process_does(
    coredump_socket: socket.socket, tmp_path: Path
) -> None:
    own = core_head_of(coredump_socket, tmp_path / "file", 0x31, None)

    assert segments(core_head_of(coredump_socket, tmp_path / "file", 0x31, 0x1FF)) == segments(own)


def test_what_the_kernel_left_out_is_not_looked_into(
    coredump_socket: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*_: object) -> bool:
        raise AssertionError("it may be a device, or on a disk that does not answer")

    monkeypatch.setattr(core_filter, "_is_elf", look)

    head = core_head_of(coredump_socket, tmp_path / "file", 0x1, 0x11)

    assert any(not size for _, _, size, _ in segments(head))


async def test_core_without_shared_memory(recorder_with: MakeRecorder, tmp_path: Path) -> None:
    recorder = recorder_with(recorder_coredump_filter="0x31")
    await recorder.start()

    pid, _ = crash(crasher("kinds"), "0x1ff", tmp_path / "file")

    record = await recorder.captured(pid)
    core = recorder.file(pid, "core")
    content = core.read_bytes()
    assert len(content) == record.files[core.name].size
    assert not record.files[core.name].truncated
    assert not record.notes
    for kept in (b"private-memory", b"changed-file", b"private-huge"):
        assert content.count(kept) >= MIB / 16, kept
    for left_out in (b"shared-memory", b"unnamed-file", b"shared-file", b"shared-huge"):
        assert content.count(left_out) < 10, left_out  # the program has the words, too
    shown = gdb(crasher("kinds"), core, "bt", "p count")
    assert "crash_here" in shown
    assert "main (count=3" in shown
    assert "crash_here" in recorder.file(pid, "backtrace").read_text()


def test_process_that_is_gone_keeps_its_head(
    coredump_socket: socket.socket, tmp_path: Path
) -> None:
    died = Crash(coredump_socket, crasher("kinds"), "0x1ff", tmp_path / "file")
    died.end()

    with pytest.raises(PagesUnreadable):
        core_filter.narrowed(Pages(died.pid, died.head, died.maps), 0x31)


def test_core_that_the_stream_must_tell_is_the_process_s_own(
    coredump_socket: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = Crash(coredump_socket, crasher("kinds"), "0x1ff", tmp_path / "file")
    monkeypatch.setattr(core_pages, "copy", _refuse)
    path = tmp_path / "core"
    try:
        pages = Pages(died.pid, died.head, died.maps)
        pages = replace(pages, head=core_filter.narrowed(pages, 0x31))
        with path.open("wb") as file:
            copied = core_copy.copy(
                died.hold, pages.head.raw, pages.head.size, file.fileno(), 0, pages
            )
    finally:
        died.end()

    assert copied == Copied(died.head.size or 0, streamed=True)
    with path.open("rb") as core:
        assert segments(core_head.read(core.read)) == segments(died.head)
    assert path.read_bytes().count(b"unnamed-file") >= MIB / 16
    assert "crash_here" in gdb(crasher("kinds"), path, "bt")


def _refuse(*_: object) -> int:
    raise PagesUnreadable("memory without read permission is refused")
