"""Cancellation that no library loses."""

import asyncio
from typing import Any


class obeying_cancellation:  # noqa: N801 - reads as the statement it is
    """Context that a cancellation always leaves.

    Before Python 3.12 asyncio.wait_for, by which NATS's client waits, returns a result that came
    at the same moment and forgets the cancellation (python/cpython#86296). A loop around it
    would then go on for ever.
    """

    def __enter__(self) -> None:
        self._before = _cancellations()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if _cancellations() > self._before and not isinstance(error, asyncio.CancelledError):
            raise asyncio.CancelledError


def _cancellations() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task else 0
