"""What is left to do for a crash, whatever came already, in whatever order and how often."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from crashbus.layout import LARGE, Kind, crash_file_name
from crashbus.messages import DeadLetter, Receipt, WorkItem
from crashbus.parts import CrashFile, Process
from services.collector.ledger import Crash, Source
from services.collector.plan import (
    RENEWALS,
    apply_failure,
    apply_receipt,
    is_unfinished,
    waiting,
    wants,
    work_items,
)

PLACES = ("file:///a", "s3://bucket/b", "tcp://h:1", "tcp://h:2?core=true")
KINDS = (Kind.INFO, Kind.BACKTRACE, Kind.SNAPSHOT, Kind.CFG, Kind.CORE)


def file(kind: Kind, epoch: int) -> CrashFile:
    return CrashFile(
        name=crash_file_name(kind, epoch),
        kind=kind,
        size=epoch,
        sha256=f"{KINDS.index(kind):064x}",
        encoding="identity",
        stored_size=epoch,
        chunks=1,
    )


def crash(kinds: set[Kind], epochs: set[int], places: tuple[str, ...]) -> Crash:
    process = Process(boot_id="b", pid=1, ns_pid=1, start_ticks=1, uid=0, gid=0, comm="x")
    made = Crash(crash_id="0" * 16, host="h", crashed_at=1.0, process=process, destinations=places)
    for kind, epoch in itertools.product(kinds, epochs):
        one = file(kind, epoch)
        made.sources[one.name] = Source(directory="1", name=one.name, kind=kind, file=one)
    return made


CRASHES = st.builds(
    crash,
    st.sets(st.sampled_from(KINDS), min_size=1),
    st.sets(st.integers(1, 3), min_size=1),
    st.lists(st.sampled_from(PLACES), min_size=1, unique=True).map(tuple),
)


def wanted(one: Crash) -> set[tuple[str, str]]:
    """Return each file and destination that go together."""
    return {
        (source.name, place)
        for source in one.sources.values()
        for place in one.destinations
        if wants(place, source.kind)
    }


def asked_for(items: list[WorkItem]) -> list[tuple[str, str]]:
    return [(one.name, item.destination) for item in items for one in item.files]


def all_items(one: Crash) -> list[WorkItem]:
    return work_items(one, core=False) + work_items(one, core=True)


def receipt(one: Crash, name: str, place: str, **changes: object) -> Receipt:
    known = one.sources[name].file
    assert known is not None
    return Receipt(
        host="h",
        crash_id=one.crash_id,
        file=known.model_copy(update=changes),
        destination=place,
        url=place,
        attempts=1,
        shipper="s",
    )


@given(CRASHES)
def test_every_file_is_asked_for_once_at_every_place_that_wants_it(one: Crash) -> None:
    found = asked_for(all_items(one))

    assert sorted(found) == sorted(wanted(one))
    large = [item.files[0].kind in LARGE for item in work_items(one, core=True)]
    assert all(large)


@given(CRASHES, st.randoms(use_true_random=False))
def test_receipts_count_in_any_order_and_however_often_they_come(
    one: Crash, chance: random.Random
) -> None:
    pairs = sorted(wanted(one))
    came = chance.choices(pairs, k=chance.randrange(2 * len(pairs) + 1)) if pairs else []

    for name, place in came:
        is_new = place in waiting(one, one.sources[name])
        assert apply_receipt(one, receipt(one, name, place)) is is_new

    left = set(asked_for(all_items(one)))
    assert set(pairs) - set(came) <= left
    # What goes together over one connection goes again together, and nothing else does.
    together = {pair for pair in left & set(came) if pair[1].startswith("tcp")}
    assert left == (set(pairs) - set(came)) | together
    still_waits = {(s.name, p) for s in one.sources.values() for p in waiting(one, s)}
    assert still_waits == set(pairs) - set(came)
    assert is_unfinished(one)  # manifest.json is still to come


@given(CRASHES, st.data())
def test_receipt_for_other_bytes_counts_for_nothing(one: Crash, data: st.DataObject) -> None:
    name, place = data.draw(st.sampled_from(sorted(wanted(one)) or [("", "")]))
    if not name:
        return
    for change in ({"sha256": "f" * 64}, {"size": 1 << 40}):
        assert not apply_receipt(one, receipt(one, name, place, **change))
    assert not apply_receipt(one, receipt(one, name, "file:///elsewhere"))
    assert place in waiting(one, one.sources[name])


@given(CRASHES, st.lists(st.sampled_from(["chunks_missing", "access_denied"]), max_size=12))
def test_failures_are_heeded_once_and_a_receipt_is_stronger(one: Crash, reasons: list[str]) -> None:
    items = all_items(one)
    if not items:
        return
    item, name = items[0], items[0].files[0].name
    source = one.sources[name]
    for number, reason in enumerate(reasons):
        letter = DeadLetter(
            host="h",
            time=1000.0 + number,
            crash_id=one.crash_id,
            service="shipper",
            reason=reason,
            error="e",
            mend="m",
            work=item,
        )
        apply_failure(one, letter)
        state = one.model_copy(deep=True)
        assert not apply_failure(one, letter)
        assert one == state
    missing = reasons.index("access_denied") if "access_denied" in reasons else len(reasons)
    assert source.renewals == min(missing, RENEWALS)
    assert bool(source.failed) == ("access_denied" in reasons or len(reasons) > RENEWALS)

    assert apply_receipt(one, receipt(one, name, item.destination))
    assert not source.failed


def test_complaint_about_what_is_on_the_bus_alone_leaves_it_there_for_a_replay() -> None:
    one = crash({Kind.CORE}, {1}, PLACES[:1])
    (item,) = all_items(one)
    (source,) = one.sources.values()
    source.removed, source.on_bus = True, 1
    letter = DeadLetter(
        host="h",
        time=1000.0,
        crash_id=one.crash_id,
        service="shipper",
        reason="damaged_file",
        error="e",
        mend="m",
        work=item,
    )

    assert apply_failure(one, letter)

    assert source.failed == {PLACES[0]: "damaged_file"}
    assert source.on_bus == 1
