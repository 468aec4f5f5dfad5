"""Crashes of a given random seed: real ones, and sets of files as the recorder leaves them.

The latter let a fault of the delivery be tried without touching the host's core_pattern.
"""

import asyncio
import hashlib
import itertools
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from crashbus import crash_id, identity, layout
from crashbus.layout import Kind
from services.common.capture import CapturedFile
from tests.support.crashers import crasher
from tests.support.records import Writing, process

MIB = 1024 * 1024
LARGE = 0.1  # of all cores
MOST_SMALL = 8  # MiB that a core may have which is not large, at least
# The last that the kernel gives, proc_sys_kernel(5): none of them is alive.
_pids = itertools.count(4_100_000)


@dataclass(frozen=True)
class CrashSet:
    """What was written.

    Attributes:
        size: of its core, in bytes.
        sha256: of each file, by its name.
    """

    crash_id: str
    size: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class RealCrash:
    """A process that died of a signal.

    Attributes:
        size: of what it had in memory, in bytes.
        at: when the signal was sent, in Unix seconds.
    """

    crash_id: str
    pid: int
    size: int
    at: float


async def victim(mib: int) -> asyncio.subprocess.Process:
    """Start a process, and return it once it has so many MiB of noise in its memory."""
    process = await asyncio.create_subprocess_exec(
        crasher("heap"), str(mib), stdout=asyncio.subprocess.PIPE, cwd="/tmp"
    )
    assert process.stdout is not None
    await process.stdout.readline()
    return process


async def crash(process: asyncio.subprocess.Process, mib: int) -> RealCrash:
    """Let a process of `victim` die, and wait for its end."""
    name = crash_id(identity.boot_id(), process.pid, identity.start_ticks(process.pid))
    at = time.time()
    process.send_signal(signal.SIGSEGV)
    await asyncio.wait_for(process.wait(), 120)
    return RealCrash(name, process.pid, mib * MIB, at)


def core_size(random: Random, least: int, largest: int) -> int:
    """Return a size between these MiB, in bytes; large cores are few, as they are on a host."""
    low, high = float(least), max(float(min(MOST_SMALL, largest)), largest / 10)
    if random.random() < LARGE:
        low, high = max(least, largest / 4), float(largest)
    return int(MIB * low * (high / low) ** random.random()) + random.randrange(4096)


def write_set(spool: Path, host: str, core: Iterable[bytes], random: Random) -> CrashSet:
    """Write a set with the recorder's files, in its order.

    It is seen from its first file on, as on a host.
    """
    pid, epoch = next(_pids), int(time.time())
    of = process(pid, identity.boot_id(), random.getrandbits(40), "fault")
    writing = Writing(spool, of, epoch, host)
    sizes, hashes = {}, {}
    for kind in layout.SHIPPING_ORDER:
        if kind in layout.SHARED:
            continue
        name = layout.crash_file_name(kind, epoch)
        pieces = core if kind is Kind.CORE else _text(kind, random)
        sizes[name], hashes[name] = _write(writing.place / name, pieces)
    writing.complete({name: CapturedFile(size=size) for name, size in sizes.items()})
    return CrashSet(writing.crash_id, sizes[layout.crash_file_name(Kind.CORE, epoch)], hashes)


def _write(path: Path, pieces: Iterable[bytes]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def _text(kind: Kind, random: Random) -> Iterator[bytes]:
    yield f"{kind} {random.getrandbits(64):x}\n".encode() * random.randrange(1, 200)


def core_pieces(size: int, random: Random, *, noisy: bool = False) -> Iterator[bytes]:
    """Yield what memory is made of: noise, text and zeros; or noise, which does not compress."""
    left = size
    while left:
        piece = min(left, MIB)
        left -= piece
        match 4 if noisy else random.randrange(4):
            case 0:
                yield bytes(piece)
            case 1:
                word = random.randbytes(8)
                yield (word * (piece // 8 + 1))[:piece]
            case _:
                yield random.randbytes(piece)
