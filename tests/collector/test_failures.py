"""Which failures are told again."""

from pathlib import Path

import pytest

from crashbus import Bus, DeadLetter, Manifest, Replay
from crashbus.errors import MessageTooLarge
from crashbus.layout import Kind
from crashbus.message_base import Message
from services.collector.failures import Failures, untold_letters
from services.collector.ledger import Crash, Ledger, Source, Told
from services.collector.plan import apply_failure
from services.collector.replay import apply_replay
from tests.collector.conftest import FILE, reported_crash

WHY = Told(error="no such bucket", mend="make it")


def failed(name: str = "core_1") -> Source:
    source = Source(directory="7", name=name, kind=Kind.CORE)
    source.give_up(FILE, "no_such_bucket", WHY)
    return source


def told(crash: Crash, *letters: DeadLetter) -> list[DeadLetter]:
    return [*untold_letters(crash, letters)]


def test_each_file_is_told_until_it_is_told() -> None:
    crash = reported_crash(failed("core_1"), failed("core_2"))

    letters = told(crash)

    assert [letter.files for letter in letters] == [("core_1",), ("core_2",)]
    assert {(one.reason, one.error, one.mend) for one in letters} == {
        ("no_such_bucket", WHY.error, WHY.mend)
    }
    assert all(letter.destinations == (FILE,) for letter in letters)
    # One of them went with its age, the other is still there.
    assert [letter.files for letter in told(crash, letters[1])] == [("core_1",)]
    assert told(crash, *letters) == []


def test_letter_that_was_answered_does_not_tell_of_what_failed_since() -> None:
    crash = reported_crash(failed())
    (old,) = told(crash)
    crash.sources["core_1"].renewed_for = old.time

    (new,) = told(crash, old)

    assert told(crash, old, new.model_copy(update={"time": old.time + 1})) == []


def test_what_is_lost_is_not_told_again() -> None:
    source = failed()
    source.lost = True
    assert told(reported_crash(source)) == []


def test_what_is_told_again_is_no_news_for_the_ledger() -> None:
    """It may come after the replay that it caused."""
    source = failed()
    crash = reported_crash(source)
    (letter,) = told(crash)
    source.expect(FILE)
    assert not apply_failure(crash, letter)


def test_entry_of_an_older_version_is_told_with_what_it_has() -> None:
    entry = failed().model_dump(exclude={"told"})
    (letter,) = told(reported_crash(Source.model_validate(entry)))
    assert (letter.reason, letter.files) == ("no_such_bucket", ("core_1",))
    assert "crashbus retry" in letter.mend


def test_replay_takes_back_what_the_manifest_said_of_the_failure() -> None:
    crash = reported_crash(failed())
    crash.notes = [WHY.error, "another"]
    (letter,) = told(crash)
    replay = Replay(
        host=crash.host,
        crash_id=crash.crash_id,
        destination=FILE,
        files=("core_1",),
        failed_at=letter.time,
    )
    assert apply_replay(crash, replay)
    assert crash.notes == ["another"]
    assert told(crash) == []


async def test_crash_that_cannot_be_told_does_not_keep_the_others(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    ledger.load()
    crashes = [reported_crash(failed()) for _ in range(3)]
    for number, crash in enumerate(crashes):
        crash.crash_id, crash.crashed_at = str(number) * 16, float(number)
        crash.reported, crash.revision = (), 1  # of its files none could be read
        await ledger.save(crash)
    publish = bus.publish

    async def fail_once(message: Message) -> None:
        if getattr(message, "crash_id", None) == crashes[1].crash_id:
            raise MessageTooLarge("of this one")
        await publish(message)

    monkeypatch.setattr(bus, "publish", fail_once)
    await Failures(bus, ledger, recheck=60).look()

    told = {crashes[0].crash_id, crashes[2].crash_id}
    assert {letter.crash_id for letter in await bus.stored(DeadLetter)} == told
    assert {manifest.crash_id for manifest in await bus.stored(Manifest)} == told
