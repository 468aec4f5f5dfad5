"""A store that is gone and a forged work item: what health, dead letters and Prometheus tell."""

import asyncio
import time
from typing import NamedTuple

import pytest
import pytest_asyncio

from crashbus import Bus, Receipt
from crashbus.messages import DeadLetter, WorkItem
from crashbus.subjects import place_token
from tests.compose.delivery import S3, WITHIN, check_contents, delivered, healthy
from tests.compose.stack import Stack
from tests.support.docker import IMAGE
from tests.support.prometheus import Prometheus
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="package")


class Troubles(NamedTuple):
    """What became of both."""

    receipts: list[Receipt]
    letter: DeadLetter


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def troubles(stack: Stack, bus: Bus) -> Troubles:
    return Troubles(await crash_without_store(stack, bus), await foreign_work(bus))


async def crash_without_store(stack: Stack, bus: Bus) -> list[Receipt]:
    """Crash a container while the store is gone; return the receipts when it is back."""
    (storage,) = stack.containers("storage")
    shippers = stack.containers("shipper")
    await healthy(stack, "storage", "shipper")
    stack.docker("kill", storage)

    container = await asyncio.to_thread(stack.engine.run, "--rm", IMAGE, "/null_pointer")

    await until(lambda: any(S3 in stack.fault(one) for one in shippers), WITHIN, every=0.5)
    stack.docker("start", storage)
    _, receipts = await delivered(stack, bus, container)
    return receipts


async def foreign_work(bus: Bus) -> DeadLetter:
    """Publish work for a destination that no shipper has, as work for one; return what is said."""
    foreign = "s3://elsewhere/taken"
    file = {"name": "info_1795388839", "kind": "info", "size": 0, "sha256": "0" * 64}
    item = WorkItem.model_validate(
        {
            "host": "forged",
            "crash_id": "0" * 16,
            "time": time.time(),
            "crashed_at": time.time(),
            "process_name": "forged",
            "destination": foreign,
            "files": [{**file, "encoding": "identity", "stored_size": 0, "chunks": 0}],
        }
    )
    subject = item.subject.replace(place_token(foreign), place_token(S3))

    await bus.publish_raw(subject, item.encode())

    async def refused() -> list[DeadLetter]:
        return await bus.stored(DeadLetter, f"crash.failed.forged.{item.crash_id}")

    (letter,) = await until(refused, WITHIN, every=0.2)
    return letter


async def test_crash_waits_for_a_store_that_is_gone_and_the_shipper_says_so(
    stack: Stack, troubles: Troubles
) -> None:
    await asyncio.to_thread(check_contents, stack, troubles.receipts)
    await healthy(stack, "storage", "shipper")


async def test_work_for_a_foreign_destination_is_refused(troubles: Troubles) -> None:
    assert troubles.letter.reason == "destination_not_configured"


# Each of these is more than nothing.
COUNTED = {
    "signals seen": 'sum(crashbus_detector_events_total{disposition="default"})',
    "crashes captured": 'sum(crashbus_recorder_captures_total{result="complete"})',
    "hold time": "sum(crashbus_recorder_hold_seconds_count)",
    "bytes into the collector": "sum(crashbus_collector_read_bytes_total)",
    "bytes out of the collector": "sum(crashbus_collector_sent_bytes_total)",
    "bytes into the shippers": "sum(crashbus_shipper_bytes_in_total)",
    "bytes out of the shippers": "sum(crashbus_shipper_bytes_out_total)",
    "queue": "count(crashbus_shipper_queue_items)",
    "retries": "sum(crashbus_shipper_retries_total)",
    "dead letters": 'sum(crashbus_shipper_failures_total{reason="destination_not_configured"})',
    "latency": 'sum(crashbus_collector_delivery_seconds_count{part="whole"})',
    "all are healthy": "sum(crashbus_healthy) == count(up)",
}
# Nothing was lost for want of room, and nothing waits any more.
NOTHING = {
    "queue depth": "sum(crashbus_shipper_queue_items)",
    "oldest undelivered": "max(crashbus_collector_oldest_undelivered_seconds)",
    "dropped files": 'sum(crashbus_collector_dropped_files_total{loss!="copy"})',
    "dropped signal events": (
        "sum(crashbus_detector_ring_buffer_lost_total) + sum(crashbus_detector_outbox_lost)"
    ),
}


async def test_prometheus_of_the_compose_file_sees_all_of_it(
    stack: Stack, troubles: Troubles
) -> None:
    asked = Prometheus(f"{stack.address('prometheus')}:9090")

    for query in COUNTED.values():
        await until(lambda q=query: asked.value(q), WITHIN, every=0.5)  # type: ignore[misc, arg-type]
    for query in NOTHING.values():
        await until(lambda q=query: asked.value(q) == 0, WITHIN, every=0.5)  # type: ignore[misc, arg-type]
    assert asked.up() == {"detector", "recorder", "collector", "shipper"}
