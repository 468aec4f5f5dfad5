"""What a fault address meant in the crashed process: which mapping it was in, or between.

Reads /proc/<pid>/maps, proc_pid_maps(5), as it was while the process was held.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from crashbus import names
from services.common.proc import mappings

_NULL_PAGES = 64 * 1024  # bytes; vm.mmap_min_addr, below which nobody may map anything
# An overflowing stack faults just below what it may grow to: a frame is seldom larger.
_BELOW_STACK = 1024 * 1024  # bytes
_MAX_PATH = 512  # bytes shown


@dataclass(frozen=True)
class _Mapping:
    start: int
    end: int
    access: str
    offset: int
    name: str


def describe(maps: bytes, address: int) -> str:
    """Return in words what an address was.

    Args:
        maps: /proc/<pid>/maps, or its beginning.
    """
    if address < _NULL_PAGES:
        return f"null pointer: {address:#x} is in the first pages, where nothing is ever mapped"
    below = above = None
    for mapping in _parse(maps):
        if mapping.start <= address < mapping.end:
            return _inside(mapping, address)
        if mapping.start > address:
            above = mapping
            break
        below = mapping
    return _between(below, above, address)


def _inside(mapping: _Mapping, address: int) -> str:
    if mapping.access.startswith("---"):
        return f"guard page: {address - mapping.start:#x} bytes into {mapping.name}, no access"
    place = address - mapping.start + mapping.offset
    return f"mapped {mapping.access}: {mapping.name} + {place:#x}"


def _between(below: _Mapping | None, above: _Mapping | None, address: int) -> str:
    if above is not None and above.name == "[stack]" and above.start - address <= _BELOW_STACK:
        return f"stack overflow: {above.start - address:#x} bytes below the main thread's stack"
    parts = []
    if below is not None:
        parts.append(f"{address - below.end:#x} bytes above {below.name}")
    if above is not None:
        parts.append(f"{above.start - address:#x} bytes below {above.name}")
    return ", ".join(("not mapped", *parts))


def _parse(maps: bytes) -> Iterator[_Mapping]:
    for one in mappings(maps):
        name = names.text(one.path[:_MAX_PATH]) or "anonymous memory"
        yield _Mapping(one.start, one.end, names.text(one.access), one.offset, name)
