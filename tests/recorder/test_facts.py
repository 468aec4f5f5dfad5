"""/proc is read as it is, and as an attacker would have it."""

import os
from pathlib import Path

import pytest

from services.recorder import facts

MAPS = b"""\
55d0-55d1 r--p 00000000 fe:00 12 /usr/bin/x y
55d1-55d3 r-xp 00001000 fe:00 12 /usr/bin/x y
7f00-7f01 rw-p 00000000 00:00 0
7f01-7f02 r--p 00000000 fe:00 13 /usr/share/data
7f02-7f03 r-xp 00000000 fe:00 14 /lib/deleted.so (deleted)
7f03-7f04 r-xp 00000000 00:00 0 [vdso]
garbage
"""


def test_files_that_are_mapped_as_code() -> None:
    assert facts.parse_maps(MAPS) == [
        ("/usr/bin/x y", 0x55D0, 0x55D3, "55d0-55d1"),
        ("/lib/deleted.so (deleted)", 0x7F02, 0x7F03, "7f02-7f03"),
    ]


def test_maps_cut_within_a_line_do_not_hurt() -> None:
    for length in range(len(MAPS)):
        facts.parse_maps(MAPS[:length])


def test_name_cannot_make_a_line_of_its_own() -> None:
    name, other = b"/x\rzz-1 a b c d e", b"/x\r1-2 r-xp 0 fe:00 9 /y"
    line = b"7f0%d-7f1%d r-xp 00000000 fe:00 12 %s\n"

    found = facts.parse_maps(line % (0, 0, name) + line % (2, 2, other))

    assert [path.encode() for path, *_ in found] == [name, other]


def test_line_that_cannot_be_parsed_costs_no_other() -> None:
    lines = MAPS.splitlines(keepends=True)
    for number in range(len(lines)):
        torn = b"".join((*lines[:number], b"zz-1 r-xp 0 0 1 /z\n", *lines[number:]))
        assert facts.parse_maps(torn) == facts.parse_maps(MAPS)


def test_files_of_no_use_are_closed() -> None:
    process = facts.read_identity(os.getpid(), "boot")
    rest = facts.read_rest(process)
    opened = facts.open_modules(rest.task, rest.maps, 2)
    unused, end = os.pipe()
    try:
        known = facts.with_modules(rest, 2, opened | {"1-2": unused})
        assert {one.file for one in known.modules if one.file >= 0} == set(opened.values())
        known.close()
        for file in (*opened.values(), unused):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(file)
    finally:
        os.close(end)


def test_limits() -> None:
    limits = facts.parse_limits(Path("/proc/self/limits").read_text())

    assert limits["Max open files"].endswith(" files")
    assert len(limits) > 10
    assert facts.parse_limits("garbage\n\nx\n") == {}


def test_modules_of_a_living_process_are_the_mapped_files_themselves() -> None:
    process = facts.read_identity(os.getpid(), "boot")
    known = facts.with_modules(facts.read_rest(process), 4)
    try:
        opened = [module for module in known.modules if module.file >= 0]
        assert len(opened) == 4
        for module in opened:
            assert os.path.samestat(os.fstat(module.file), Path(module.path).stat())
    finally:
        known.close()
