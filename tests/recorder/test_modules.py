"""What is mapped as code is found as it is, and as an attacker would have it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashbus import names
from services.common import proc
from services.recorder import facts, modules

MAPS = b"""\
55d0-55d1 r--p 00000000 fe:00 12 /usr/bin/x y
55d1-55d3 r-xp 00001000 fe:00 12    /usr/bin/x y
000055d4-000055d5 r-xp 00000000 fe:00 15 /usr/bin/low
7f00-7f01 rw-p 00000000 00:00 0
7f01-7f02 r--p 00000000 fe:00 13 /usr/share/data
7f02-7f03 r-xp 00000000 fe:00 14 /lib/deleted.so (deleted)
7f03-7f04 r-xp 00000000 00:00 0 [vdso]
garbage
"""


def test_files_that_are_mapped_as_code() -> None:
    assert modules.parse_maps(MAPS) == [
        ("/usr/bin/x y", 0x55D0, 0x55D3, "55d0-55d1"),
        ("/usr/bin/low", 0x55D4, 0x55D5, "55d4-55d5"),  # as map_files has it
        ("/lib/deleted.so (deleted)", 0x7F02, 0x7F03, "7f02-7f03"),
    ]


def test_maps_cut_within_a_line_do_not_hurt() -> None:
    for length in range(len(MAPS)):
        modules.parse_maps(MAPS[:length])


def test_name_cannot_make_a_line_of_its_own() -> None:
    name, other = b"/x\rzz-1 a b c d e", b"/x\r1-2 r-xp 0 fe:00 9 /y"
    line = b"7f0%d-7f1%d r-xp 00000000 fe:00 12 %s\n"

    found = modules.parse_maps(line % (0, 0, name) + line % (2, 2, other))

    assert [path.encode() for path, *_ in found] == [name, other]


def _mapping(number: int, access: str, inode: int, path: bytes) -> bytes:
    """Return a line as show_map_vma() makes it, fs/proc/task_mmu.c."""
    start = 0x400000 + (number << 16)
    line = f"{start:08x}-{start + 4096:08x} {access} {number << 12:08x} fe:00 {inode} "
    return line.encode().ljust(73 if path else 0) + path + b"\n"


NAMES = (b"", b"/a", b"/a b", b"/a (deleted)", b"/a\r\v", b"/ 00:00 0 ", b"[heap]", b"/\xff ")


@given(
    st.lists(
        st.builds(
            _mapping,
            st.integers(0, 9_000_000),
            st.sampled_from(["r--p", "r-xp", "rw-s", "---p", "--xs"]),
            st.integers(0, 3),
            st.sampled_from(NAMES),
        )
    )
)
def test_no_file_is_found_but_those_that_all_mappings_tell(lines: list[bytes]) -> None:
    raw = b"".join(sorted(lines))
    told = [one for one in proc.mappings(raw) if one.path and one.inode != b"0"]
    code = dict.fromkeys((one.inode, one.path) for one in told if one.is_code)

    expected = {
        (names.text(path), ends[0].start, ends[-1].end, f"{ends[0].start:x}-{ends[0].end:x}")
        for inode, path in code
        if (ends := [one for one in told if (one.inode, one.path) == (inode, path)])
    }

    assert set(modules.parse_maps(raw)) == expected


def test_line_that_cannot_be_parsed_costs_no_other() -> None:
    lines = MAPS.splitlines(keepends=True)
    for number in range(len(lines)):
        torn = b"".join((*lines[:number], b"zz-1 r-xp 0 0 1 /z\n", *lines[number:]))
        assert modules.parse_maps(torn) == modules.parse_maps(MAPS)


def test_files_of_no_use_are_closed() -> None:
    process = facts.read_identity(os.getpid(), "boot")
    rest = facts.read_rest(process)
    opened = modules.open_files(rest.task, rest.maps, 2)
    unused, end = os.pipe()
    try:
        found = modules.read(rest.task, rest.maps, 2, opened | {"1-2": unused})
        known = replace(rest, modules=found)
        assert {one.file for one in known.modules if one.file >= 0} == set(opened.values())
        known.close()
        for file in (*opened.values(), unused):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(file)
    finally:
        os.close(end)


def test_modules_of_a_living_process_are_the_mapped_files_themselves() -> None:
    process = facts.read_identity(os.getpid(), "boot")
    rest = facts.read_rest(process)
    known = replace(rest, modules=modules.read(rest.task, rest.maps, 4))
    try:
        opened = [module for module in known.modules if module.file >= 0]
        assert len(opened) == 4
        for module in opened:
            assert os.path.samestat(os.fstat(module.file), Path(module.path).stat())
    finally:
        known.close()
