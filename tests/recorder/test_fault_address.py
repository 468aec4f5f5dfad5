"""What an address was, from mappings and for real crashes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.recorder.unwinding.fault_address import describe
from tests.recorder.conftest import MakeRecorder
from tests.support.crashers import crasher
from tests.support.recorder import crash

MAPS = b"""\
400000-401000 r--p 00000000 fe:00 123 /usr/bin/app
401000-403000 r-xp 00001000 fe:00 123 /usr/bin/app
7f0000000000-7f0000001000 ---p 00000000 00:00 0
7f0000001000-7f0000801000 rw-p 00000000 00:00 0
7f0000900000-7f0000901000 r--s 00002000 fe:00 124 /srv/a file (deleted)
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
"""


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (0, "null pointer: 0x0 is in the first pages, where nothing is ever mapped"),
        (0xFFFF, "null pointer: 0xffff is in the first pages, where nothing is ever mapped"),
        (0x10000, "not mapped, 0x3f0000 bytes below /usr/bin/app"),
        (0x401010, "mapped r-xp: /usr/bin/app + 0x1010"),
        (0x403000, "not mapped, 0x0 bytes above /usr/bin/app, 0x7effffbfd000 bytes below "
         "anonymous memory"),
        (0x7F0000000FF8, "guard page: 0xff8 bytes into anonymous memory, no access"),
        (0x7F0000900004, "mapped r--s: /srv/a file (deleted) + 0x2004"),
        (0x7FFBFFFFFFF8, "stack overflow: 0x8 bytes below the main thread's stack"),
        (1 << 63, "not mapped, 0x7fff8003fffdf000 bytes above [stack]"),
    ],
)  # fmt: skip
def test_address_in_words(address: int, words: str) -> None:
    assert describe(MAPS, address) == words


def test_nothing_is_known_without_mappings() -> None:
    assert describe(b"", 1 << 40) == "not mapped"


@given(st.integers(0, len(MAPS)), st.integers(0, (1 << 64) - 1))
def test_mappings_cut_anywhere_are_read_as_far_as_they_go(cut: int, address: int) -> None:
    assert describe(MAPS[:cut], address)


@pytest.mark.parametrize(
    ("program", "words"),
    [("null_pointer", "null pointer"), ("stack_overflow", "stack overflow")],
)
async def test_snapshot_says_what_a_crash_touched(
    recorder_with: MakeRecorder, program: str, words: str
) -> None:
    recorder = recorder_with()
    await recorder.start()

    pid, _ = crash(crasher(program))
    await recorder.captured(pid)

    snapshot = json.loads(recorder.file(pid, "snapshot").read_bytes())
    assert snapshot["FaultMapping"].startswith(words)
