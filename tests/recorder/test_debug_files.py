"""What debug information refers to is read as it is, and as an attacker would have it."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.recorder.unwinding import debug_files
from tests.support.packaged import Packaged, packaged
from tests.support.requirements import need_program


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    return packaged(tmp_path_factory.mktemp("packaged") / "made")


def test_link_is_name_and_build_id(made: Packaged) -> None:
    with made.debug.open("rb") as debug, made.common.open("rb") as common:
        link = debug_files.link_of(debug.fileno())
        assert link is not None
        assert link.name == "/nowhere/.dwz/some/common.debug"
        assert link.build_id == debug_files.build_id_of(common.fileno())
        assert debug_files.link_of(common.fileno()) is None


def test_link_of_a_32_bit_file_is_read(tmp_path: Path) -> None:
    need_program("objcopy")
    link, file = tmp_path / "link", tmp_path / "file"
    link.write_bytes(b"common.debug\0" + b"\xab" * 20)
    section = f".gnu_debugaltlink={link}"
    command = ["objcopy", "-I", "binary", "-O", "elf32-little", "--add-section", section]
    subprocess.run([*command, link, file], check=True)

    with file.open("rb") as made:
        assert debug_files.link_of(made.fileno()) == debug_files.Link("common.debug", "ab" * 20)


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=8)), max_size=8),
    st.integers(0, 10_000),
)
def test_file_of_anything_has_a_link_or_none(
    made: Packaged, changes: list[tuple[int, bytes]], cut: int
) -> None:
    raw = bytearray(made.debug.read_bytes())
    for at, new in changes:
        raw[at : at + len(new)] = new
    place = made.debug.with_name("changed")
    place.write_bytes(raw[:cut] or raw)
    with place.open("rb") as file:
        link = debug_files.link_of(file.fileno())
        assert link is None or 2 <= len(bytes.fromhex(link.build_id)) <= 64
        debug_files.build_id_of(file.fileno())
