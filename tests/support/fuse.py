"""A file system of one file that stops to answer when it is told to; fuse(4).

The messages are those of the kernel's include/uapi/linux/fuse.h.
"""

import ctypes
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS = 1, 2, 3, 14, 15, 17
INIT, INTERRUPT, BATCH_FORGET = 26, 36, 42
ROOT, FILE = 1, 2
NOT_IMPLEMENTED, NO_ENTRY = 38, 2
LAZY = 2  # umount2(2), MNT_DETACH


class StandingStill:
    """Serves a program below a directory from a process of its own.

    Args:
        directory: made, and mounted on.
    """

    def __init__(self, directory: Path, program: Path) -> None:
        self._directory = directory
        self._source = program
        self.program = directory / "program"

    def __enter__(self) -> "StandingStill":
        self._directory.mkdir()
        places = (str(self._directory), str(self._source))
        command = [sys.executable, "-m", "tests.support.fuse", *places]
        self._server = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"mounted\n"
        return self

    def stand_still(self) -> None:
        """Answer nothing from now on."""
        self._server.send_signal(signal.SIGSTOP)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._server.kill()  # whoever waits gets an error
        self._server.communicate()
        ctypes.CDLL(None).umount2(bytes(self._directory), LAZY)


@contextmanager
def overlaid(lower: Path, place: Path) -> Iterator[None]:
    """Mount an overlay at a place that is made, and shows what lies in another, mount(8)."""
    place.mkdir()
    empty = place.with_name(f"{place.name}-empty")  # one layer makes no overlay
    empty.mkdir()
    options = f"lowerdir={lower}:{empty}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", place], check=True)
    try:
        yield
    finally:
        ctypes.CDLL(None).umount2(bytes(place), LAZY)


def serve(directory: str, source: str) -> None:
    """Mount and answer until killed."""
    content = Path(source).read_bytes()
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"test", directory.encode(), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    print("mounted", flush=True)
    while True:
        request = os.read(device, 1 << 20)
        _, operation, unique, node = struct.unpack_from("IIQQ", request)
        if operation not in (FORGET, BATCH_FORGET, INTERRUPT):
            error, body = answer(operation, node, request[40:], content)
            os.write(device, struct.pack("IiQ", 16 + len(body), -error, unique) + body)


def answer(operation: int, node: int, body: bytes, content: bytes) -> tuple[int, bytes]:
    """Return errno and body of an answer."""
    if operation == INIT:
        return 0, struct.pack("IIIIHHII", 7, 31, 0, 0, 8, 8, 65536, 1).ljust(64, b"\0")
    if operation == LOOKUP:
        if node != ROOT or body.rstrip(b"\0") != b"program":
            return NO_ENTRY, b""
        return 0, struct.pack("QQQQII", FILE, 0, 3600, 0, 0, 0) + attributes(FILE, len(content))
    if operation == GETATTR:
        return 0, struct.pack("QII", 0, 0, 0) + attributes(node, len(content))
    if operation == STATFS:  # asked by an overlay
        return 0, struct.pack("5Q4I24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
    if operation == OPEN:
        return 0, struct.pack("QII", 0, 0, 0)
    if operation == READ:
        offset, size = struct.unpack_from("QI", body, 8)
        return 0, content[offset : offset + size]
    return NOT_IMPLEMENTED, b""


def attributes(node: int, size: int) -> bytes:
    mode, size = (0o100755, size) if node == FILE else (0o40755, 0)
    times = struct.pack("QQQIII", 1, 1, 1, 0, 0, 0)
    return struct.pack("QQQ", node, size, 8) + times + struct.pack("7I", mode, 1, 0, 0, 0, 4096, 0)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
