"""Threads that stand still get stand-ins, and these end when they are not needed any more."""

import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from services.recorder.errors import RecorderError
from services.recorder.workers import MAX_STUCK, Workers
from tests.support.wait import until


class Job:
    def __init__(self, stuck: bool = False) -> None:
        self.may_end = threading.Event()
        self.ended = threading.Event()
        self.stuck = stuck
        if not stuck:
            self.may_end.set()

    def do(self) -> None:
        self.may_end.wait()
        self.ended.set()


Make = Callable[[int], tuple["Workers[Job]", "queue.Queue[Job]"]]


@pytest.fixture
def make() -> Iterator[Make]:
    jobs: list[Job] = []

    class Remembering(queue.Queue[Job]):
        def put(self, item: Job, block: bool = True, timeout: float | None = None) -> None:
            jobs.append(item)
            super().put(item, block, timeout)

    def made(count: int) -> "tuple[Workers[Job], queue.Queue[Job]]":
        items: queue.Queue[Job] = Remembering()
        workers = Workers("test", count, items, Job.do, lambda job, _: job.stuck)
        workers.start()
        return workers, items

    yield made
    for job in jobs:
        job.may_end.set()


def _are_in_work(workers: Workers[Job], count: int) -> bool:
    return len(workers.in_work()) == count


async def test_work_goes_on_beside_threads_that_stand_still(make: Make) -> None:
    workers, items = make(2)
    stuck = [Job(stuck=True) for _ in range(5)]
    for job in stuck:
        items.put(job)
    for alive in (2, 4, 5):
        await until(partial(_are_in_work, workers, alive))
        workers.replace_stuck()
    last = Job()
    items.put(last)

    await until(last.ended.is_set)

    assert workers.in_work() == stuck


async def test_stand_ins_end_when_the_others_work_again(make: Make) -> None:
    workers, items = make(1)
    stuck = Job(stuck=True)
    items.put(stuck)
    await until(lambda: workers.in_work() == [stuck])
    workers.replace_stuck()
    assert workers._threads == 2
    stuck.may_end.set()
    stuck.stuck = False
    await until(lambda: not workers.in_work())
    workers.replace_stuck()

    for _ in range(3):
        job = Job()
        items.put(job)
        await until(job.ended.is_set)

    await until(lambda: workers._threads == 1)


async def test_too_many_that_stand_still_are_an_error(make: Make) -> None:
    workers, items = make(MAX_STUCK + 1)
    for _ in range(MAX_STUCK + 1):
        items.put(Job(stuck=True))
    await until(lambda: len(workers.in_work()) == MAX_STUCK + 1)

    with pytest.raises(RecorderError, match="only a restart"):
        workers.replace_stuck()


async def test_those_that_wait_have_stand_ins_and_are_no_error() -> None:
    items: queue.Queue[Job] = queue.Queue()
    workers = Workers("test", MAX_STUCK + 1, items, Job.do, lambda *_: False, lambda job: job.stuck)
    workers.start()
    waiting = [Job(stuck=True) for _ in range(MAX_STUCK + 1)]
    try:
        for job in waiting:
            items.put(job)
        await until(lambda: len(workers.in_work()) == len(waiting))
        workers.replace_stuck()
        last = Job()
        items.put(last)
        await until(last.ended.is_set)
    finally:
        for job in waiting:
            job.may_end.set()


async def test_queue_counts_what_is_done(make: Make) -> None:
    workers, items = make(3)
    for _ in range(20):
        items.put(Job())

    await until(lambda: not items.unfinished_tasks)

    assert workers.in_work() == []
