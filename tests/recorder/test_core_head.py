"""A core's head is parsed whoever wrote it, and believed by nobody."""

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.recorder.core import core_head
from services.recorder.core.core_head import Cause


def note(kind: int, body: bytes, order: str = "<") -> bytes:
    padded = body + b"\0" * (-len(body) % 4)
    return struct.pack(order + "III", 5, len(body), kind) + b"CORE\0\0\0\0" + padded


def prstatus(signal: int, tid: int, order: str = "<") -> bytes:
    body = struct.pack(order + "iiihhQQi", signal, 0, 0, signal, 0, 0, 0, tid)
    return note(1, body + b"\0" * 300, order)


def siginfo(signal: int, code: int, *union: int, order: str = "<") -> bytes:
    form = "Q" if len(union) == 1 else "iI"
    body = struct.pack(order + "iiii" + form, signal, 0, code, 0, *union)
    return note(0x53494749, body.ljust(128, b"\0"), order)


def core(notes: bytes, memory: int = 8192, order: str = "<") -> bytes:
    """A 64-bit core with one note segment and one of memory, whose bytes are left out."""
    ident = b"\x7fELF\x02" + (b"\x01" if order == "<" else b"\x02") + b"\x01".ljust(10, b"\0")
    header = struct.pack(order + "HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    first = struct.pack(order + "IIQQQQQQ", 4, 0, 176, 0, 0, len(notes), 0, 0)
    second = struct.pack(order + "IIQQQQQQ", 1, 6, 65536, 0, 0, memory, memory, 4096)
    return ident + header + first + second + notes


class Endless:
    """A stream that goes on, and counts on nobody who reads gigabytes of it."""

    def __init__(self, raw: bytes) -> None:
        self._file = io.BytesIO(raw)

    def read(self, size: int) -> bytes:
        assert size < 1 << 25, "so much is not read into memory"
        return self._file.read(size).ljust(size, b"\0")


def read(raw: bytes) -> core_head.Head:
    return core_head.read(io.BytesIO(raw).read)


@pytest.mark.parametrize("order", ["<", ">"])
def test_fault_tells_its_address(order: str) -> None:
    notes = prstatus(11, 77, order) + siginfo(11, 1, 0xDEADBEEF, order=order)

    head = read(core(notes, order=order))

    assert head.cause == Cause(11, 1, 0, fault_address=0xDEADBEEF)
    assert (head.tid, head.size, head.fault) == (77, 65536 + 8192, None)


def test_signal_sent_by_a_process_tells_the_sender_and_no_address() -> None:
    head = read(core(prstatus(7, 77) + siginfo(7, 0, 4321, 1000)))

    assert head.cause == Cause(7, 0, 0, sender_pid=4321, sender_uid=1000)


def test_old_kernel_without_siginfo_tells_the_signal() -> None:
    assert read(core(prstatus(6, 77))).cause == Cause(6)


def test_head_is_returned_byte_for_byte() -> None:
    raw = core(prstatus(6, 77) + siginfo(6, -6, 1, 2)).ljust(65536, b"\0")

    assert read(raw + b"memory").raw == raw


@pytest.mark.parametrize("length", [0, 3, 16, 63, 100, 200])
def test_core_that_ends_in_its_head_is_told(length: int) -> None:
    raw = core(prstatus(6, 77))[:length]

    head = read(raw)

    assert head.raw == raw
    assert head.fault is not None
    assert "it ends after" in head.fault


def test_no_elf_is_told() -> None:
    assert read(b"GET / HTTP/1.1\r\n" * 10).fault == (
        "the core's head cannot be read: it is no ELF file"
    )


@pytest.mark.parametrize("place", [1 << 25, 4 << 30, 1 << 60, (1 << 64) - 1])
@pytest.mark.parametrize("count", [2, 0xFFFE, 0xFFFF])  # the last is PN_XNUM: see elsewhere
def test_program_headers_that_are_said_to_be_far_away_are_not_read(place: int, count: int) -> None:
    raw = bytearray(core(b""))
    struct.pack_into("<Q", raw, 32, place)  # e_phoff
    struct.pack_into("<H", raw, 56, count)  # e_phnum

    head = core_head.read(Endless(bytes(raw)).read)

    assert "too far away" in (head.fault or "")
    assert len(head.raw) < 1000


def test_number_of_program_headers_is_bounded() -> None:
    raw = bytearray(core(b""))
    struct.pack_into("<H", raw, 56, 0xFFFF)  # e_phnum, PN_XNUM
    struct.pack_into("<Q", raw, 72, 1 << 60)  # p_offset of the notes, which follow the table

    head = core_head.read(Endless(bytes(raw)).read)

    assert "too many" in (head.fault or "")
    assert len(head.raw) < 1000


def test_more_mappings_than_its_header_can_count() -> None:
    """From 65,535 on the number is elsewhere, elf(5)."""
    count, notes = 70_000, prstatus(11, 77) + siginfo(11, 1, 0)
    header = bytearray(core(b"")[:64])
    struct.pack_into("<H", header, 56, 0xFFFF)
    data = 64 + 56 * (count + 1)
    table = [struct.pack("<IIQQQQQQ", 4, 0, data, 0, 0, len(notes), 0, 0)]
    first = -(-(data + len(notes)) // 4096) * 4096
    for number in range(count):
        place, address = first + number * 4096, (number + 1) * 8192
        table.append(struct.pack("<IIQQQQQQ", 1, 6, place, address, 0, 4096, 4096, 4096))

    head = read(b"".join((bytes(header), *table, notes)))

    assert head.fault is None
    assert (head.tid, head.size) == (77, first + count * 4096)
    assert sum(1 for _ in head.loads()) == count


@settings(deadline=None)
@given(st.binary(max_size=4096))
def test_garbage_is_told(raw: bytes) -> None:
    head = read(raw)

    assert raw.startswith(head.raw)
    assert head.fault is not None


@settings(deadline=None)
@given(st.data())
def test_damaged_core_is_parsed_or_told(data: st.DataObject) -> None:
    raw = bytearray(core(prstatus(11, 77) + siginfo(11, 1, 0)))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))

    head = read(bytes(raw))

    assert bytes(raw).startswith(head.raw)
    assert head.fault is not None or head.size is not None
