"""Memory for the parts of large objects: bounded, and used again for the next part.

To grow anew for each part would cost the kernel a page fault for every 4 KiB.
"""

import asyncio


class PartBuffer:
    """Bytes that are appended until they are sent.

    Args:
        expected: bytes that it will have at most; more is no error.
    """

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._memory = bytearray()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, data: bytes) -> None:
        """Append a copy of data."""
        end = self._size + len(data)
        if end > len(self._memory):
            larger = bytearray(max(end, self._expected))
            larger[: self._size] = self.content
            self._memory = larger
        memoryview(self._memory)[self._size : end] = data
        self._size = end

    @property
    def content(self) -> memoryview:
        """What was appended; valid until it is cleared."""
        return memoryview(self._memory)[: self._size]

    def clear(self) -> None:
        """Be empty for the next part."""
        self._size = 0


class PartBuffers:
    """The buffers that all uploads to a destination share.

    Args:
        count: how many there are; who wants one more waits.
        part_size: of most parts, in bytes.
    """

    def __init__(self, count: int, part_size: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._expected = part_size + part_size // 8  # a part ends with the chunk that fills it
        self._taken = 0
        self._spare: list[PartBuffer] = []

    async def take(self) -> PartBuffer:
        """Return an empty one, once there is one."""
        await self._free.acquire()
        self._taken += 1
        return self._spare.pop() if self._spare else PartBuffer(self._expected)

    def give_back(self, buffer: PartBuffer, in_use: bool = False) -> None:
        """Let another upload have one; after the last one no memory is kept.

        Args:
            in_use: a request that was broken off may still read it, so it is not used again.
        """
        self._taken -= 1
        if not in_use:
            buffer.clear()
            self._spare.append(buffer)
        if not self._taken:
            self._spare.clear()
        self._free.release()
