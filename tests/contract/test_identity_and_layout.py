"""Names of crashes and of their files: no one outside can choose another's."""

import pytest

from crashbus.identity import crash_id, unknown_crash_id
from crashbus.layout import Kind, parse_crash_file_name

BOOT = "6b0f7d52-2b6c-4c0e-9d3b-6d3f6a2d5f10"


def test_crash_of_an_unseen_process_never_meets_that_of_a_seen_one() -> None:
    seen = crash_id(BOOT, 4711, 123456)
    assert seen == "6yc64n619m5am3wr"
    assert unknown_crash_id(BOOT, 4711, 123456, 0) != seen
    # The parts are apart: no value of one can stand for the tag or for its neighbour.
    assert unknown_crash_id(BOOT, 1, 23, 4) != unknown_crash_id(BOOT, 12, 3, 4)


def test_unseen_processes_of_two_users_are_two_crashes() -> None:
    ids = {unknown_crash_id(BOOT, 4711, 1795388839, uid) for uid in (0, 1000, 1001)}
    assert len(ids) == 3
    assert all(len(one) == 16 for one in ids)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("core_1795388839", (Kind.CORE, 1795388839)),
        ("info_0", (Kind.INFO, 0)),
        ("info_253402300799", None),
        ("info_99999999999", (Kind.INFO, 99999999999)),
        ("info_253402300800", None),
        ("info_999999999999", None),
        ("info_\u0661\u0662\u0663", None),
        ("info_\uff11", None),
        ("info_-1", None),
        ("info_1.zst", None),
        ("info_1\n", None),
        ("backtrace_7.json", (Kind.BACKTRACE_JSON, 7)),
        ("info_7.json", None),
        ("core_7.json", None),
        ("backtrace_7.json.json", None),
        ("manifest_1", None),
    ],
)
def test_crash_file_names(name: str, meaning: tuple[Kind, int] | None) -> None:
    assert parse_crash_file_name(name) == meaning
