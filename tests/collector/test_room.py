"""What goes first when there is too little room."""

from hypothesis import given
from hypothesis import strategies as st

from services.collector.room import Candidate, Loss, excess, excess_on_disk, to_remove

MANY = 1 << 40


def core(crash: str, executable: str, since: float, loss: Loss = Loss.LARGE) -> Candidate:
    return Candidate(crash, "core_1", executable, since, 10, loss)


def order(candidates: list[Candidate], excess: int = MANY) -> list[str]:
    return [one.crash_id for one in to_remove(candidates, excess)]


def test_oldest_of_the_noisiest_executable_goes_first() -> None:
    loop = [core(f"loop{n}", "/bin/loop", n) for n in (3, 2, 4)]
    rare = core("rare", "/bin/rare", 1)

    assert order([rare, *loop], 10) == ["loop2"]
    # Two of the loop are left against one: they go on until no executable is noisier.
    assert order([rare, *loop])[:2] == ["loop2", "loop3"]


def test_what_is_delivered_goes_before_anything_else_oldest_first() -> None:
    delivered = [Candidate(f"old{n}", "", "/bin/rare", n, 10, Loss.NOTHING) for n in (9, 8)]

    assert order([core("loop", "/bin/loop", 1), *delivered]) == ["old8", "old9", "loop"]


def test_copies_of_what_is_on_the_bus_go_before_cores_and_these_before_small_files() -> None:
    small = Candidate("a", "info_1", "/bin/loop", 1, 10, Loss.SMALL)

    found = order([small, core("b", "/bin/x", 2), core("c", "/bin/x", 9, Loss.COPY)])

    assert found == ["c", "b", "a"]


def test_no_more_goes_than_must() -> None:
    cores = [core(str(n), "/bin/x", n) for n in range(5)]

    assert order(cores, 0) == []
    assert len(order(cores, 11)) == 2


def test_limits() -> None:
    assert excess(100, 0) == 0
    assert excess(100, 90) == 10
    assert excess_on_disk(1000, 50, 6) == 10
    assert excess_on_disk(1000, 500, 6) == 0


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        st.sampled_from("abcdef"),
        st.sampled_from(["core_1", "info_1", "cfg_1"]),
        st.sampled_from(["/bin/x", "/bin/y"]),
        st.floats(0, 100),
        st.integers(0, 100),
        st.sampled_from(Loss),
    ),
    max_size=12,
    unique=True,
)


@given(CANDIDATES, st.integers(-10, 2000))
def test_enough_goes_and_less_would_not_be_enough(found: list[Candidate], wanted: int) -> None:
    gone = list(to_remove(found, wanted))

    assert len(set(gone)) == len(gone)
    assert set(gone) <= set(found)
    freed = [one.size for one in gone]
    assert sum(freed) >= wanted or len(gone) == len(found)
    assert not gone or sum(freed[:-1]) < wanted
    losses = [one.loss for one in gone]
    assert losses == sorted(losses)
