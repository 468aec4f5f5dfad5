"""Who waits for a capture thread is let go, or left to its helper."""

import os
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest

from services.recorder.errors import CaptureFailed
from services.recorder.handover.hold import Hold
from services.recorder.handover.mechanism import Mechanism
from services.recorder.patience import Patience
from services.recorder.settings import RecorderSettings


@dataclass
class Captures:
    """Threads with these crashes in work."""

    holds: list[Hold]

    def in_work(self) -> list[Hold]:
        return self.holds


@pytest.fixture
def three() -> Iterator[list[Hold]]:
    holds = [Hold(os.open("/dev/null", os.O_RDONLY), 1, time.monotonic() - 60) for _ in range(3)]
    yield holds
    for one in holds:
        one.close()


@pytest.mark.parametrize("waits", [True, False])
def test_who_waits_for_a_turn_is_no_sign_of_a_disk_that_answers(
    three: list[Hold], waits: bool
) -> None:
    """On one that does not, the pipe helper would never end."""
    arrived, stuck, other = three
    other.waits = waits
    other.last_progress = time.monotonic()
    arrivals: queue.Queue[Hold] = queue.Queue()
    arrivals.put(arrived)
    told: list[CaptureFailed] = []
    captures = cast(Any, Captures([stuck, other]))
    settings = RecorderSettings(stall_deadline=20)

    Patience(settings, Mechanism.PIPE, arrivals, captures, told.append).give_up_waiting()

    assert bool(told) is waits
    assert not arrivals.qsize()
