"""When to try again, without a clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from crashbus.destination import Scheme
from crashbus.errors import BusUnreachable
from services.shipper import policy
from services.shipper.failure import Final, Passing
from services.shipper.policy import Policy
from services.shipper.settings import ShipperSettings
from tests.shipper.conftest import quick

POLICY = Policy.of("s3", quick(retry_first=0.5, retry_cap=60, give_up=86400))
QUICK = Policy.of("s3", quick())


@given(st.integers(1, 10_000))
def test_item_rests_longer_each_time_up_to_the_cap(deliveries: int) -> None:
    longest = min(60, 0.5 * 2 ** min(deliveries, 20))
    assert longest / 2 <= POLICY.hand_back_delay(deliveries) <= longest


def test_item_is_given_up_by_its_age_and_never_by_count() -> None:
    assert not POLICY.is_too_late(published=1000, now=1000 + 86400)
    assert POLICY.is_too_late(published=1000, now=1001 + 86400)
    assert not POLICY.is_too_late(published=2000, now=1000)


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

    assert await QUICK.retries(seen.append, hopeless=lambda: False)(failing) == "done"
    assert [type(error) for error in seen] == [Passing, BusUnreachable, Passing]


async def test_what_is_final_is_not_tried_again() -> None:
    failing = Failing(Final("access_denied", "no", "allow it"))

    with pytest.raises(Final):
        await QUICK.retries(lambda error: None, hopeless=lambda: False)(failing)
    assert failing.calls == 1


async def test_destination_in_trouble_gets_one_try() -> None:
    failing = Failing(passing(), passing())

    with pytest.raises(Passing):
        await QUICK.retries(lambda error: None, hopeless=lambda: True)(failing)
    assert failing.calls == 1


async def test_bus_is_waited_for_even_then() -> None:
    failing = Failing(BusUnreachable("away"), BusUnreachable("away"))

    retries = QUICK.retries(lambda error: None, hopeless=lambda: True)
    assert await retries(failing) == "done"


@pytest.mark.parametrize(
    ("scheme", "cap", "give_up"),
    [("s3", 60, 86400), ("tcp", 5, 3600), ("tls", 5, 3600), ("file", 60, 7200)],
)
def test_each_kind_of_destination_has_a_policy_of_its_own(
    scheme: Scheme, cap: float, give_up: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRASHBUS_SHIPPER_RETRY_TCP", "cap=5, give_up=3600")
    monkeypatch.setenv("CRASHBUS_SHIPPER_RETRY_FILE", "give_up=7200")

    found = Policy.of(scheme, ShipperSettings())

    assert found == Policy(first=0.5, cap=cap, in_hand=20, give_up=give_up)


@pytest.mark.parametrize("given", ["cap", "cap=", "cap=0", "cap=nan", "give_up=-1", "wait=3"])
def test_policy_that_cannot_be_read_is_refused(given: str) -> None:
    with pytest.raises(ValidationError):
        ShipperSettings(retry_s3=given)
