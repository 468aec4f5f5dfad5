"""What state a crash is in, and which one an ID means."""

import pytest

from crashbus.cli.crashes import GATHERING, Crash, State, choose, join
from crashbus.cli.errors import Trouble
from crashbus.layout import Kind
from tests.cli.support import EPOCH, make

FILE, TCP = "file:///a", "tcp://127.0.0.1:9"
LATER = EPOCH + 10 * GATHERING


def test_a_crash_whose_files_all_have_receipts_is_delivered() -> None:
    made = make(destinations=(FILE, "file:///b"))
    crash = Crash(made.id, made.manifest, receipts=made.receipts())
    assert crash.state(LATER) is State.DELIVERED


@pytest.mark.parametrize("lost", range(6))
def test_one_missing_receipt_means_delivering(lost: int) -> None:
    made = make(destinations=(FILE, "file:///b"))
    receipts = made.receipts()
    missing = receipts.pop(lost)
    crash = Crash(made.id, made.manifest, receipts=receipts)
    assert crash.state(LATER) is State.DELIVERING
    assert crash.undelivered() == {(missing.destination, missing.file.name)}


def test_a_receipt_for_other_bytes_counts_for_nothing() -> None:
    made = make(destinations=(FILE,))
    first, *rest = made.receipts()
    other = first.model_copy(update={"file": first.file.model_copy(update={"sha256": "0" * 64})})
    assert Crash(made.id, made.manifest, receipts=[other, *rest]).state(LATER) is State.DELIVERING


@pytest.mark.parametrize(("url", "state"), [(TCP, "delivered"), (TCP + "?core=true", "delivering")])
def test_a_core_counts_for_tcp_only_where_it_is_asked_for(url: str, state: str) -> None:
    made = make(destinations=(url,))
    receipts = [one for one in made.receipts() if one.file.kind is not Kind.CORE]
    assert Crash(made.id, made.manifest, receipts=receipts).state(LATER) == state


def test_a_dead_letter_means_failed_until_a_later_delivery() -> None:
    made = make(destinations=(FILE,))
    failed = Crash(made.id, made.manifest, failures=[made.failure()])
    assert failed.state(LATER) is State.FAILED
    failed.receipts = made.receipts()
    assert failed.state(LATER) is State.DELIVERED


def test_a_loss_that_no_delivery_mends_stays_failed() -> None:
    made = make(destinations=(FILE,))
    letter = made.failure().model_copy(update={"work": None})
    crash = Crash(made.id, made.manifest, receipts=made.receipts(), failures=[letter])
    assert crash.state(LATER) is State.FAILED


def test_an_event_alone_is_being_gathered_and_then_not_captured() -> None:
    crash = Crash(make().id, events=[make().event])
    assert crash.state(EPOCH + 1) is State.DELIVERING
    assert crash.state(LATER) is State.NOT_CAPTURED


def test_a_manifest_without_files_is_not_captured() -> None:
    made = make(destinations=(FILE,))
    empty = made.manifest.model_copy(update={"files": ()})
    crash = Crash(made.id, empty, failures=[made.failure()])
    assert crash.state(EPOCH) is State.NOT_CAPTURED


def test_a_handled_signal_is_no_crash_unless_appscope_handles_it() -> None:
    event = make().event.model_copy(update={"disposition": "handled"})
    assert join([], [event], [], []) == []
    handler = {"address": 1, "flags": 0, "appscope": True}
    ours = type(event).model_validate({**event.model_dump(), "handler": handler})
    assert [crash.crash_id for crash in join([], [ours], [], [])] == [event.crash_id]


def test_the_highest_revision_of_a_manifest_counts() -> None:
    made = make()
    second = made.manifest.model_copy(update={"revision": 2})
    assert join([second, made.manifest], [], [], [])[0].manifest == second


def test_newest_crash_first() -> None:
    old, new = make(1, crashed_at=EPOCH), make(2, crashed_at=EPOCH + 1)
    listed = join([old.manifest, new.manifest], [], [], [])
    assert [crash.crash_id for crash in listed] == [new.id, old.id]


def test_a_unique_beginning_chooses() -> None:
    assert choose(["abc", "abd", "x"], "X", "here") == "x"
    assert choose(["abc", "abcd"], "abc", "here") == "abc"


@pytest.mark.parametrize("given", ["", " ", "zzz", "abcde"])
def test_an_unknown_id_is_said_to_be_unknown(given: str) -> None:
    with pytest.raises(Trouble, match=r"no crash .* here; crashbus ls"):
        choose(["abc", "abd"], given, "here")


def test_an_ambiguous_beginning_names_the_candidates() -> None:
    with pytest.raises(Trouble, match=r"'ab' begins 2 crash IDs here: abc, abd; give more"):
        choose(["abc", "abd"], "ab", "here")
