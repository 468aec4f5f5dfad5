"""Waiting for a condition, with a bound."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def until(
    condition: Callable[[], T | Awaitable[T]], within: float = 60, every: float = 0.02
) -> T:
    """Return the first true result of `condition`.

    Raises:
        TimeoutError: it was not true within the given seconds; the last result is shown.
    """
    end = time.monotonic() + within
    while True:
        result = condition()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return result
        if time.monotonic() > end:
            raise TimeoutError(f"not true within {within} s; last result: {result!r}")
        await asyncio.sleep(every)
