"""What is shared out of the recorder's descriptors is never more than there are."""

import pytest

from services.recorder.conditions import MODULE_FILES
from services.recorder.descriptors import Shares

OURS = 64


@pytest.mark.parametrize("descriptors", [256, 512, 1024, 4096, 1 << 20])
def test_shares_are_no_more_than_all(descriptors: int) -> None:
    shares = Shares.of(descriptors, captures=16)

    assert descriptors >= OURS + sum(
        (
            8 * (shares.captures + shares.waiting),
            shares.accepted,
            3 * shares.unfinished,
            MODULE_FILES * shares.with_modules,
            4 * (shares.chained + shares.chained_at_once),
        )
    )
    assert min(shares.captures, shares.unfinished, shares.with_modules) >= 1


def test_usual_limit_takes_nothing_away() -> None:
    assert Shares.of(1024, captures=16).captures == 16
    assert Shares.of(1 << 19, captures=16) == Shares(16, 32, 1024, 256, 3071, 64, 16)
