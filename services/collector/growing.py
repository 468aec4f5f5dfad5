"""Following a core that its recorder is still writing."""

import asyncio
import os
import time

from crashbus.errors import CrashbusError
from services.common import unfinished

LOOK_EVERY = 0.02  # seconds
STANDS_STILL = 30.0  # seconds without a byte after which the core is sent when it is whole


class Unsteady(CrashbusError):
    """A file that is being written cannot be followed to its end."""


class Growing:
    """How far a file has come.

    Args:
        file: its descriptor.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._begun = False

    async def reach(self, wanted: int) -> int:
        """Wait until `wanted` bytes are final or no more will come; return how many are.

        Raises:
            Unsteady: it stands still, or its writer does not say what is final.
        """
        seen, since = -1, time.monotonic()
        while True:
            final = unfinished.final_bytes(self._file)
            size = os.fstat(self._file).st_size
            if self._begun and final is None:  # its writer has ended, in order or not
                return size
            if final is not None:
                self._begun = True
                if final >= min(wanted, size):
                    return min(final, size)
                if final > seen:
                    seen, since = final, time.monotonic()
            if time.monotonic() - since > STANDS_STILL:
                raise Unsteady(f"it stands still at {seen} bytes of {size}")
            await asyncio.sleep(LOOK_EVERY)
