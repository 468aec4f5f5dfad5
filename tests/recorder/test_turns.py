"""Large cores take turns, and leave threads to small ones."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from crashbus.parts import Container, Process
from services.recorder.core.turns import Turns
from services.recorder.handover.hold import Hold
from tests.support.records import process
from tests.support.wait import until


@dataclass
class Copying:
    """A thread that copies a large core until it is told to end."""

    turns: Turns
    process: Process
    hold: Hold = field(default_factory=lambda: Hold(os.open("/dev/null", os.O_RDONLY), 1))
    may_end: threading.Event = field(default_factory=threading.Event)
    is_on: bool | None = None

    def start(self) -> "Copying":
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def _run(self) -> None:
        with self.turns.turn(self.process, self.hold) as self.is_on:
            self.may_end.wait()

    def end(self) -> None:
        self.may_end.set()
        self.hold.close()
        self.thread.join()


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def of(uid: int, container: str = "") -> Process:
    found = Container(id=container, runtime="docker") if container else None
    return process(1).model_copy(update={"uid": uid, "container": found})


async def test_one_owner_leaves_turns_to_others_and_all_leave_threads(ending: ExitStack) -> None:
    turns = Turns(captures=16, waiting=32, patience=60)

    def start(one: Process) -> Copying:
        copying = Copying(turns, one).start()
        ending.callback(copying.end)
        return copying

    of_one = [start(of(1000)) for _ in range(8)]
    await until(lambda: sum(bool(one.is_on) for one in of_one) == 6)
    await until(lambda: sum(one.hold.waits for one in of_one) == 2)

    others = [start(of(1000, "c" * 64)), *(start(of(uid)) for uid in range(6))]
    await until(lambda: sum(bool(one.is_on) for one in others) == 6)
    await until(lambda: sum(one.hold.waits for one in others) == 1)

    next(one for one in of_one if one.is_on).end()
    await until(lambda: sum(bool(one.is_on) for one in (*of_one, *others)) == 13)


async def test_who_lets_it_wait_too_long_has_no_turn(ending: ExitStack) -> None:
    turns = Turns(captures=2, waiting=1, patience=0.01)
    first = Copying(turns, of(1)).start()
    ending.callback(first.end)
    await until(lambda: first.is_on)

    with turns.turn(of(2), first.hold) as is_on:
        assert not is_on
    assert not first.hold.waits


async def test_no_more_wait_than_there_are_threads_for(ending: ExitStack) -> None:
    turns = Turns(captures=1, waiting=1, patience=60)
    first, second = (Copying(turns, of(uid)).start() for uid in (1, 2))
    for one in (first, second):
        ending.callback(one.end)
    await until(lambda: any(one.hold.waits for one in (first, second)))

    with turns.turn(of(3), Hold(os.open("/dev/null", os.O_RDONLY), 1)) as is_on:
        assert not is_on


async def test_process_that_is_let_go_waits_no_more(ending: ExitStack) -> None:
    turns = Turns(captures=1, waiting=1, patience=60)
    first = Copying(turns, of(1)).start()
    ending.callback(first.end)
    await until(lambda: first.is_on)
    second = Copying(turns, of(2)).start()
    ending.callback(second.end)
    await until(lambda: second.hold.waits)

    second.hold.let_go("enough")

    await until(lambda: second.is_on is False)


async def test_turn_of_who_was_let_go_holds_up_nobody(ending: ExitStack) -> None:
    """Its thread may wait for a disk that never answers."""
    turns = Turns(captures=1, waiting=1, patience=60)
    first = Copying(turns, of(1)).start()
    ending.callback(first.end)
    await until(lambda: first.is_on)
    second = Copying(turns, of(2)).start()
    ending.callback(second.end)
    await until(lambda: second.hold.waits)

    first.hold.let_go("it stood still")

    await until(lambda: second.is_on)


@pytest.mark.parametrize("comer", [1, 2], ids=["same owner", "another"])
async def test_who_comes_does_not_overtake_who_waits(ending: ExitStack, comer: int) -> None:
    turns = Turns(captures=1, waiting=2, patience=60)
    first = Copying(turns, of(1)).start()
    ending.callback(first.end)
    await until(lambda: first.is_on)
    second = Copying(turns, of(1)).start()
    ending.callback(second.end)
    await until(lambda: second.hold.waits)

    first.hold.let_go("it stood still")  # which the second sees at its next look
    third = Copying(turns, of(comer)).start()
    ending.callback(third.end)

    await until(lambda: second.is_on or third.is_on)
    assert third.is_on is None
    second.end()
    await until(lambda: third.is_on)


async def test_nobody_waits_for_a_turn_when_the_recorder_stops(ending: ExitStack) -> None:
    turns = Turns(captures=1, waiting=2, patience=60)
    first = Copying(turns, of(1)).start()
    ending.callback(first.end)
    await until(lambda: first.is_on)
    second = Copying(turns, of(2)).start()
    ending.callback(second.end)
    await until(lambda: second.hold.waits)

    turns.stop()

    await until(lambda: second.is_on is False)
    with turns.turn(of(3), second.hold) as is_on:
        assert not is_on


async def test_cgroups_below_a_users_slice_are_that_users(ending: ExitStack) -> None:
    """Users make cgroups there with names like containers', and have subordinate UIDs."""
    turns = Turns(captures=4, waiting=1, patience=60)
    session = "/user.slice/user-1000.slice/user@1000.service/"
    first, second = (
        of(uid, container).model_copy(update={"cgroup": f"{session}{container}"})
        for uid, container in ((1000, ""), (100_001, "c" * 64))
    )
    one = Copying(turns, first).start()
    ending.callback(one.end)
    await until(lambda: one.is_on)

    other = Copying(turns, second).start()
    ending.callback(other.end)

    await until(lambda: other.hold.waits or other.is_on)
    assert other.hold.waits
