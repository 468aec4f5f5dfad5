"""The circuit breaker of a destination, by a clock of its own."""

from hypothesis import given
from hypothesis import strategies as st

from services.common.health import Health
from services.shipper.failure import Failure, Final, Passing, Unfit
from services.shipper.policy import Policy
from services.shipper.standing import OPENS_AFTER, Circuit, Standing
from tests.shipper.conftest import SOME_FILE, quick

URL = "s3://crashes"
POLICY = Policy.of("s3", quick(retry_first=1, retry_cap=60))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused() -> Passing:
    return Passing("refused", "refused", "start it")


def standing(clock: Clock | None = None, health: Health | None = None) -> Standing:
    return Standing(URL, health or Health(), POLICY, clock or Clock())


def opened(clock: Clock) -> Standing:
    one = standing(clock)
    for _ in range(OPENS_AFTER):
        one.failed(refused())
    return one


def test_it_opens_after_some_failures_in_a_row_and_not_before() -> None:
    one = standing()
    for _ in range(OPENS_AFTER - 1):
        one.failed(refused())
    one.succeeded()
    for _ in range(OPENS_AFTER - 1):
        one.failed(refused())
    assert one.circuit is Circuit.CLOSED

    one.failed(refused())

    assert one.is_open
    assert one.due_in == 2


def test_what_concerns_a_file_or_is_refused_for_good_does_not_open_it() -> None:
    one = standing()
    for _ in range(10):
        one.failed(Unfit(SOME_FILE, "damaged_file", "no", "find out"))
        one.failed(Passing("internal_error", "a bug", "report it"))
        one.failed(Final("access_denied", "no", "allow it"))

    assert one.circuit is Circuit.CLOSED


def test_it_stays_open_longer_each_time_until_something_is_delivered() -> None:
    clock = Clock()
    one = opened(clock)
    waits = []
    for _ in range(8):
        waits.append(one.due_in)
        clock.now += one.due_in
        one.looked_at(None)
        assert one.circuit is Circuit.HALF_OPEN
        one.failed(refused())
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]

    clock.now += one.due_in
    one.looked_at(None)
    one.succeeded()

    assert one.circuit is Circuit.CLOSED
    for _ in range(OPENS_AFTER):
        one.failed(refused())
    assert one.due_in == 2


def test_two_looks_at_once_that_fail_count_as_one() -> None:
    clock = Clock()
    one = opened(clock)
    clock.now += one.due_in

    one.looked_at(refused())
    one.looked_at(refused())

    assert one.due_in == 4


def denied() -> Final:
    return Final("access_denied", "no", "allow it")


def failed_for_good(health: Health, failure: Failure) -> Standing:
    one = standing(health=health)
    for _ in range(OPENS_AFTER):
        one.failed(failure)
    assert health.faults()
    return one


def test_look_that_goes_well_ends_the_complaint_of_health() -> None:
    for failure in (refused(), Final("no_such_bucket", "no", "make it")):
        health = Health()
        one = failed_for_good(health, failure)

        one.looked_at(None)

        assert not health.faults()
        assert not one.is_told


def test_what_no_look_shows_is_complained_of_until_something_is_delivered() -> None:
    health = Health()
    one = failed_for_good(health, denied())

    one.looked_at(None)
    assert health.faults()
    one.succeeded()

    assert not health.faults()


def test_item_that_fails_after_a_look_went_well_is_complained_of() -> None:
    health, clock = Health(), Clock()
    one = standing(clock, health)
    for _ in range(OPENS_AFTER):
        one.failed(refused())
    clock.now += one.due_in
    one.looked_at(None)

    one.failed(refused())
    clock.now += one.due_in
    one.looked_at(None)
    assert health.faults()

    one.succeeded()
    assert not health.faults()


def test_what_a_look_showed_is_over_when_a_look_goes_well() -> None:
    health = Health()
    one = failed_for_good(health, denied())
    one.looked_at(denied())

    one.looked_at(None)

    assert not health.faults()


@given(st.lists(st.sampled_from(["passing", "final", "unusable", "usable", "success", "wait"])))
def test_whatever_happens_an_open_circuit_becomes_due_and_one_success_closes_it(
    events: list[str],
) -> None:
    clock = Clock()
    one = standing(clock)
    for event in events:
        match event:
            case "passing":
                one.failed(refused())
            case "final":
                one.failed(Final("access_denied", "no", "allow it"))
            case "unusable":
                one.looked_at(refused())
            case "usable":
                one.looked_at(None)
            case "success":
                one.succeeded()
            case "wait":
                clock.now += 10
        assert 0 <= one.due_in <= POLICY.cap
        assert one.is_open or one.due_in == 0

    one.succeeded()

    assert one.circuit is Circuit.CLOSED
