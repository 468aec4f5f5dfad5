"""What is for nobody: decided without a bus."""

import pytest

from crashbus.subjects import work_item_filter
from crashbus.work_queue import SERVED_WITHIN, QueueConsumer, QueuedMessage
from services.shipper.unclaimed import is_unclaimed

NOW = 1_000_000.0
FILTER = work_item_filter("tcp://h:1")
SUBJECT = FILTER.replace("*", "x")


def queued(subject: str = SUBJECT, age: float = 700) -> QueuedMessage:
    return QueuedMessage(7, subject, b"", NOW - age)


def consumer(pattern: str = FILTER, asking: bool = True, idle: float = 0) -> QueueConsumer:
    return QueueConsumer(pattern, asking, NOW - idle)


@pytest.mark.parametrize(
    ("found", "consumers", "unclaimed"),
    [
        (queued(), [], True),
        (queued(age=599), [], False),
        (queued(), [consumer()], False),
        (queued(), [consumer(work_item_filter("tcp://h:2"))], True),
        (queued(), [consumer(">")], False),
        (queued(), [consumer("crash.file.>")], False),
        (queued("crash.file.x"), [consumer()], True),
        (queued(f"{SUBJECT}.more"), [consumer()], True),
        (queued(), [consumer(asking=False, idle=SERVED_WITHIN - 1)], False),
        (queued(), [consumer(asking=False, idle=SERVED_WITHIN)], True),
        (queued(), [consumer(asking=True, idle=SERVED_WITHIN)], False),
    ],
)
def test_old_message_that_no_used_consumer_takes_is_unclaimed(
    found: QueuedMessage, consumers: list[QueueConsumer], unclaimed: bool
) -> None:
    assert is_unclaimed(found, consumers, NOW, patience=600) is unclaimed
