"""Writing a file so that its zeros become holes."""

import os

_GRAIN = 64 * 1024  # bytes; zeros of this size, aligned in what is written, become a hole
_ZEROS = bytes(_GRAIN)
_GLANCE = 64  # bytes that tell most other data from zeros


def write(file: int, data: bytes | bytearray, offset: int) -> int:
    """Write data at an offset that nothing was written to, without its zeros; return its size."""
    view, start = memoryview(data), 0
    for place in range(0, len(data), _GRAIN):
        # A bytes-like slice compares with memcmp(3); a memoryview compares item by item.
        if (
            data[place : place + _GLANCE] == _ZEROS[:_GLANCE]
            and data[place : place + _GRAIN] == _ZEROS
        ):
            _write_all(file, view[start:place], offset + start)
            start = place + _GRAIN
    _write_all(file, view[start:], offset + start)
    return len(data)


def _write_all(file: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
