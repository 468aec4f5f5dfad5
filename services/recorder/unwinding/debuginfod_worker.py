"""Fetches debug information and ends: ``python -I -m …debuginfod_worker``.

It runs as nobody, with the network and the files that were opened for it, and nothing else.
Standard input is an `Order`, standard output a `Fetched`, both as JSON.
"""

import os
import resource
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict

from services.recorder import hardening

_AT_ONCE = 8
_BLOCK = 256 * 1024  # bytes
_NOT_THERE = 404
_MARGIN = 0.3  # seconds of the order's that are kept for the answer
_LONGEST_FAULT, _MOST_FAULTS = 200, 4  # characters of one that is told, and how many are
_AGENT = {"User-Agent": "crashbus"}


class Wanted(BaseModel):
    """A build ID, and the descriptor of the empty file for its debug information.

    Attributes:
        urls: the first that has it gives it.
    """

    model_config = ConfigDict(frozen=True)
    build_id: str
    file: int
    urls: tuple[str, ...]


class Order(BaseModel):
    """What the worker is to fetch.

    Attributes:
        max_bytes: of one file.
        seconds: after which nobody waits for the worker any more.
    """

    model_config = ConfigDict(frozen=True)
    wanted: tuple[Wanted, ...]
    max_bytes: int
    seconds: float


class Fetched(BaseModel):
    """The worker's answer: what came whole, what nobody has, and why the rest did not come."""

    model_config = ConfigDict(frozen=True)
    whole: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def main() -> None:
    """Give up all rights, then fetch."""
    hardening.never_dump_core()
    order = Order.model_validate_json(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_FSIZE, (order.max_bytes, order.max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hardening.become_nobody()
    end = time.monotonic() + order.seconds - _MARGIN
    pool = ThreadPoolExecutor(_AT_ONCE)
    results = [(one, pool.submit(_fetch, order, one, end)) for one in order.wanted]
    whole: list[str] = []
    missing: list[str] = []
    faults: set[str] = set()
    for one, result in results:
        try:
            there = result.result(max(0.0, end - time.monotonic()))
        except Exception as error:  # noqa: BLE001 - servers are at fault in many ways; others are not
            faults.add(str(error)[:_LONGEST_FAULT] or type(error).__name__)
            continue
        (whole if there else missing).append(one.build_id)
    told = tuple(sorted(faults))[:_MOST_FAULTS]
    answer = Fetched(whole=tuple(whole), missing=tuple(missing), faults=told)
    sys.stdout.write(answer.model_dump_json())
    sys.stdout.flush()
    os._exit(0)  # threads that wait for a server do not keep us


def _fetch(order: Order, one: Wanted, end: float) -> bool:
    """Fetch a file from the first place that has it; False if none has.

    Raises:
        Exception: a server does not answer as it should.
    """
    fault: Exception | None = None
    for url in one.urls:
        try:
            _download(url, order, one.file, end)
        except urllib.error.HTTPError as error:
            if error.code != _NOT_THERE:
                fault = error
        except Exception as error:  # noqa: BLE001 - the next place may do better
            fault = error
        else:
            return True
    if fault is not None:
        raise fault
    return False


def _download(url: str, order: Order, file: int, end: float) -> None:
    request = urllib.request.Request(url, headers=_AGENT)  # noqa: S310 - checked in the settings
    seconds = max(0.1, end - time.monotonic())
    with (
        urllib.request.urlopen(request, timeout=seconds) as answer,  # noqa: S310
        os.fdopen(os.dup(file), "r+b") as copy,
    ):
        copy.seek(0)  # another server may have begun
        copy.truncate()
        announced, size = answer.headers.get("Content-Length"), 0
        while block := answer.read1(_BLOCK):
            if size + len(block) > order.max_bytes or time.monotonic() > end:
                raise ValueError("too large, or too slow")
            size += copy.write(block)
        if announced is not None and size != int(announced):
            raise ValueError(f"{size} of {announced} bytes came")


if __name__ == "__main__":
    main()
