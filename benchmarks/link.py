"""A link of a given speed to a server: a network namespace and a pair of devices between.

Only what the server's clients send and get goes over it; the server talks to itself inside.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_NEAR, _FAR = "198.18.77.1", "198.18.77.2"  # for benchmarks, RFC 2544
_BURST = "256kb"  # tc-tbf(8): more than the 64 KiB that the kernel hands over at a time
_QUEUE = "20ms"


@dataclass(frozen=True)
class Link:
    """Where the other end is.

    Attributes:
        address: of a server there.
        there: the command that runs a command there.
    """

    address: str
    there: tuple[str, ...]


@contextmanager
def link(mbit: int) -> Iterator[Link]:
    """Make a link that carries so many Mbit/s each way, and remove it; needs root."""
    name = f"crashbus-bench-{os.getpid()}"
    near, far = f"cbn{os.getpid() % 10**8}", f"cbf{os.getpid() % 10**8}"  # 15 characters at most
    there = ("ip", "netns", "exec", name)
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        for device, address, where in ((near, _NEAR, ()), (far, _FAR, there)):
            _run(*where, "ip", "address", "add", f"{address}/30", "dev", device)
            _run(*where, "ip", "link", "set", device, "up")
            speed = ("rate", f"{mbit}mbit", "burst", _BURST, "latency", _QUEUE)
            _run(*where, "tc", "qdisc", "add", "dev", device, "root", "tbf", *speed)
        _run(*there, "ip", "link", "set", "lo", "up")
        yield Link(_FAR, there)
    finally:
        subprocess.run(["ip", "link", "delete", near], capture_output=True)
        _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
