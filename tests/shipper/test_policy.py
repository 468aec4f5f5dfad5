"""When to try again, without a clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashbus.errors import BusUnreachable
from services.shipper import policy
from services.shipper.failure import Final, Passing
from tests.shipper.conftest import quick

SETTINGS = quick(retry_first=0.5, retry_cap=60, give_up=86400)


@given(st.integers(1, 10_000))
def test_item_rests_longer_each_time_up_to_the_cap(deliveries: int) -> None:
    longest = min(60, 0.5 * 2 ** min(deliveries, 20))
    assert longest / 2 <= policy.hand_back_delay(deliveries, SETTINGS) <= longest


def test_item_is_given_up_by_its_age_and_never_by_count() -> None:
    assert not policy.is_too_late(published=1000, now=1000 + 86400, settings=SETTINGS)
    assert policy.is_too_late(published=1000, now=1001 + 86400, settings=SETTINGS)
    assert not policy.is_too_late(published=2000, now=1000, settings=SETTINGS)


@pytest.mark.parametrize(
    ("reason", "failures", "waited", "goes_on"),
    [
        ("chunks_missing", 1, 0, True),
        ("chunks_missing", 2, 1000, True),
        ("chunks_missing", 3, 180, False),
        ("chunks_missing", 50, 179, True),
        ("damaged_file", 1, 1000, True),
        ("damaged_file", 2, 0, False),
        ("file_too_large", 1, 0, False),
    ],
)
def test_files_that_cannot_be_read_are_tried_as_long_as_a_collector_needs(
    reason: str, failures: int, waited: float, goes_on: bool
) -> None:
    settings = quick(source_patience=180)

    assert policy.may_mend_itself(reason, failures, waited, settings) is goes_on


class Failing:
    """Fails with each of these errors once, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def passing() -> Passing:
    return Passing("refused", "refused", "start it")


async def test_what_passes_is_tried_until_it_has() -> None:
    seen: list[BaseException] = []
    failing = Failing(passing(), BusUnreachable("away"), passing())

    assert await policy.in_hand(quick(), seen.append, hopeless=lambda: False)(failing) == "done"
    assert [type(error) for error in seen] == [Passing, BusUnreachable, Passing]


async def test_what_is_final_is_not_tried_again() -> None:
    failing = Failing(Final("access_denied", "no", "allow it"))

    with pytest.raises(Final):
        await policy.in_hand(quick(), lambda error: None, hopeless=lambda: False)(failing)
    assert failing.calls == 1


async def test_destination_in_trouble_gets_one_try() -> None:
    failing = Failing(passing(), passing())

    with pytest.raises(Passing):
        await policy.in_hand(quick(), lambda error: None, hopeless=lambda: True)(failing)
    assert failing.calls == 1


async def test_bus_is_waited_for_even_then() -> None:
    failing = Failing(BusUnreachable("away"), BusUnreachable("away"))

    retries = policy.in_hand(quick(), lambda error: None, hopeless=lambda: True)
    assert await retries(failing) == "done"
