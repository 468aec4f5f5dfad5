"""Build IDs of files, real ones and hostile ones."""

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashbus import elf
from tests.support.crashers import crasher
from tests.support.requirements import need_program


def build_id(content: bytes) -> str | None:
    file = os.memfd_create("elf")
    try:
        os.write(file, content)
        return elf.build_id(file)
    finally:
        os.close(file)


def forged(description: bytes, size: int | None = None, note_at: int = 120) -> bytes:
    """An ELF file with nothing but a program header and a note."""
    length = len(description) if size is None else size
    note = struct.pack("<III", 4, length, 3) + b"GNU\0" + description
    header = struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 4, note_at, 0, 0, len(note), len(note), 4)
    return b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + header + segment + note


@pytest.mark.parametrize("path", ["/bin/sh", "/usr/bin/python3", "own"])
def test_build_id_is_readelf_s(path: str) -> None:
    need_program("readelf")
    program = crasher("null_pointer") if path == "own" else Path(path)
    shown = subprocess.run(["readelf", "-n", program], capture_output=True, text=True).stdout
    match = re.search(r"Build ID: ([0-9a-f]+)", shown)
    assert match

    with program.open("rb") as file:
        assert elf.build_id(file.fileno()) == match[1]


def test_forged_note_is_read_as_it_is() -> None:
    assert build_id(forged(b"\xab" * 20)) == "ab" * 20


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF",
        b"\x7fELF\x02\x01",
        b"#!/bin/sh\n" * 20,
        forged(b""),
        forged(b"\xab"),
        forged(b"\xab" * 65),
        forged(b"\xab" * 20, size=1 << 31),
        forged(b"\xab" * 20, note_at=1 << 62),
        forged(b"\xab" * 20, note_at=(1 << 64) - 1),
    ],
)
def test_what_is_not_right_has_none(content: bytes) -> None:
    assert build_id(content) is None


def of_notes(*segments: bytes) -> bytes:
    """An ELF file with nothing but notes."""
    places, at = b"", 64 + 56 * len(segments)
    for notes in segments:
        places += struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(notes), len(notes), 4)
        at += len(notes)
    header = struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    return b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + header + places + b"".join(segments)


def test_so_many_notes_of_a_file_are_read_and_no_more() -> None:
    """A process that was made for it would keep the recorder busy for seconds with them."""
    note = forged(b"\xab" * 20)[120:]
    empty, large = bytes(12), struct.pack("<III", 0, 64 * 1024 - 12, 1).ljust(64 * 1024, b"\0")

    assert build_id(of_notes(*[empty] * 63, note)) == "ab" * 20
    assert build_id(of_notes(empty * 63, note)) == "ab" * 20
    assert build_id(of_notes(*[empty] * 64, note)) is None
    assert build_id(of_notes(empty * 64, note)) is None
    assert build_id(of_notes(large[: -len(note)], note)) == "ab" * 20
    assert build_id(of_notes(large, note)) is None


@given(st.binary(max_size=300), st.integers(0, 200))
def test_no_bytes_make_it_fail(noise: bytes, place: int) -> None:
    content = bytearray(forged(b"\xab" * 20))
    content[place : place + len(noise)] = noise
    found = build_id(bytes(content))
    assert found is None or re.fullmatch(r"([0-9a-f]{2}){2,64}", found)
