"""A lane gives each crash to one worker at a time, and loses no reason to look at it again."""

import asyncio

from services.collector.lanes import FIRST_AT_MOST, Lane
from tests.support.wait import until


async def test_crash_stands_in_it_once_and_is_worked_on_once_more_for_what_came_meanwhile() -> None:
    lane, worked = Lane(), list[str]()
    goes_on = asyncio.Event()

    async def work(crash_id: str) -> None:
        worked.append(crash_id)
        await goes_on.wait()

    workers = [asyncio.create_task(lane.work(work)) for _ in range(2)]
    for crash_id in ("a", "a", "b"):
        lane.put(crash_id)
    await until(lambda: len(worked) == 2)
    lane.put("a")
    lane.put("a")
    for _ in range(10):
        await asyncio.sleep(0)
    assert worked == ["a", "b"]  # by one worker each

    goes_on.set()

    await until(lambda: len(worked) == 3)
    lane.put("c")
    await until(lambda: "c" in worked)
    assert worked == ["a", "b", "a", "c"]
    for one in workers:
        one.cancel()


async def test_worker_may_ask_for_the_same_crash_again() -> None:
    lane, tries = Lane(), list[str]()

    async def fail_twice(crash_id: str) -> None:
        tries.append(crash_id)
        if len(tries) < 3:
            lane.put(crash_id)

    worker = asyncio.create_task(lane.work(fail_twice))
    lane.put("a")

    await until(lambda: len(tries) == 3)
    lane.put("b")
    await until(lambda: len(tries) == 4)
    assert tries == ["a", "a", "a", "b"]
    worker.cancel()


async def test_worker_may_keep_a_crash_first() -> None:
    """What waits for room is not overtaken by what came later."""
    lane, tries = Lane(), list[str]()

    async def fail_twice(crash_id: str) -> None:
        tries.append(crash_id)
        if tries.count("a") < 3:
            lane.keep_first(crash_id)

    for crash_id in ("a", "b", "c"):
        lane.put(crash_id)
    worker = asyncio.create_task(lane.work(fail_twice))

    await until(lambda: len(tries) == 5)
    assert tries == ["a", "a", "a", "b", "c"]
    worker.cancel()


async def test_crash_that_never_comes_further_keeps_others_waiting_only_for_some_rounds() -> None:
    lane, tries = Lane(), list[str]()

    async def never_fits(crash_id: str) -> None:
        tries.append(crash_id)
        if crash_id == "a":
            lane.keep_first(crash_id)
        await asyncio.sleep(0)

    lane.put("a")
    lane.put("b")
    worker = asyncio.create_task(lane.work(never_fits))

    await until(lambda: "b" in tries)
    assert tries.index("b") == 1 + FIRST_AT_MOST
    worker.cancel()


async def test_full_lane_says_so_and_keeps_what_it_has() -> None:
    lane, worked = Lane(2), list[str]()

    async def work(crash_id: str) -> None:
        worked.append(crash_id)

    assert [lane.put(crash_id) for crash_id in ("a", "b", "c", "a")] == [True, True, False, True]

    worker = asyncio.create_task(lane.work(work))
    await until(lambda: len(worked) == 2)
    assert lane.put("c")
    await until(lambda: worked == ["a", "b", "c"])
    worker.cancel()
