"""Blocking calls, in threads, that are over before anything else happens."""

import asyncio
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


async def run_whole(
    call: Callable[[*Ts], R],
    *args: *Ts,
    interrupt: Callable[[], None] | None = None,
    patience: float | None = None,
) -> R:
    """Run a blocking call in a thread; when cancelled, wait for its end before saying so.

    For calls on something that is closed or undone afterwards: a thread that went on by itself
    would work on a closed descriptor, or undo the undoing.

    Args:
        interrupt: makes the call end soon; called when cancelled.
        patience: seconds to wait for the end when cancelled; None: as long as it takes.
    """
    running = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if interrupt is not None:
            interrupt()
        await asyncio.wait({running}, timeout=patience)
        running.add_done_callback(seen)
        raise


def seen(task: "asyncio.Task[R]") -> None:
    """Take note of an error that no one will ask for."""
    if not task.cancelled():
        task.exception()
