"""Waiting for a condition, with a bound."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, overload

T = TypeVar("T")


@overload
async def until(
    condition: Callable[[], Awaitable[T | None]], within: float = 60, every: float = 0.02
) -> T: ...
@overload
async def until(
    condition: Callable[[], T | None], within: float = 60, every: float = 0.02
) -> T: ...
async def until(condition: Callable[[], Any], within: float = 60, every: float = 0.02) -> Any:
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


async def stop(pid: int) -> None:
    """Stop a process, and wait until none of its threads goes on.

    SIGSTOP is taken by one of them, which has to get a processor first; meanwhile the others work.
    """
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")

    def states() -> set[str]:
        texts = [(task / "stat").read_text() for task in tasks.iterdir()]
        return {text.rpartition(")")[2].split()[0] for text in texts}

    await until(lambda: states() == {"T"})
