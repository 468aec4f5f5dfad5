"""The frames in which the recorder hands over a core."""

import asyncio
import socket

from pydantic import ValidationError

from crashbus.errors import CrashbusError
from services.common import core_stream
from services.common.core_stream import Announced

SILENCE = 180.0  # seconds in the middle of a core, after which the next has its turn


class Broken(CrashbusError):
    """The recorder ended, or gave up, in the middle."""


class CoreFrames:
    """Reads the frames of one core, `services.common.core_stream`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._kind = b""
        self._left = 0  # bytes of the frame
        self._zeros = b""

    async def announced(self) -> Announced:
        """Return what comes.

        Raises:
            Broken: it is not told.
        """
        await self._next_frame()
        if self._kind != core_stream.ANNOUNCED or self._left > core_stream.MAX_TEXT:
            raise Broken("it is not told what comes")
        text = bytearray(self._left)
        await self._fill(memoryview(text))
        self._left = 0
        try:
            return Announced.model_validate_json(bytes(text))
        except ValidationError as error:
            raise Broken(f"it is not told what comes: {error.error_count()} faults") from None

    async def read(self, size: int) -> bytes:
        """Return the next bytes of the core; fewer only at its end.

        Raises:
            Broken: the recorder has ended.
        """
        if not self._left:
            await self._next_frame()
        if self._kind == core_stream.ZEROS and self._left >= size:
            self._left -= size
            if len(self._zeros) != size:
                self._zeros = bytes(size)
            return self._zeros
        data, got = bytearray(size), 0
        while got < size and self._kind != core_stream.END:
            part = min(size - got, self._left)
            if self._kind == core_stream.DATA:
                await self._fill(memoryview(data)[got : got + part])
            got += part
            self._left -= part
            if not self._left:
                await self._next_frame()
        return bytes(data[:got])

    async def _next_frame(self) -> None:
        if self._kind == core_stream.END:
            return
        header = bytearray(core_stream.FRAME.size)
        await self._fill(memoryview(header))
        self._kind, self._left = core_stream.FRAME.unpack(header)
        kinds = (core_stream.ANNOUNCED, core_stream.DATA, core_stream.ZEROS, core_stream.END)
        if self._kind not in kinds or (not self._left and self._kind != core_stream.END):
            raise Broken("there is no such frame")

    async def _fill(self, into: memoryview) -> None:
        while into:
            try:
                async with asyncio.timeout(SILENCE):
                    got = await self._loop.sock_recv_into(self._connection, into)
            except TimeoutError:  # what it reads may hang for good, and others wait for this turn
                raise Broken(f"the recorder sent nothing for {SILENCE:.0f} s") from None
            if not got:
                raise Broken("the recorder gave it up, or ended")
            into = into[got:]
