"""Kinds of memory that a core leaves out: core(5)'s coredump_filter, by a setting of the recorder.

The kernel has gone by the process's own filter when it tells what a core holds, and to change that
filter then has no effect. So the program headers are gone through by the kernel's own rules
(vma_dump_size(), fs/coredump.c), and what is left out becomes one without content, as the kernel
would have written it. More than the process's filter let in there can never be.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from services.common.proc import mappings
from services.recorder.core.core_head import Head
from services.recorder.core.core_memory import PAGE, Memory, PagesUnreadable
from services.recorder.core.core_pages import Pages

ANON_PRIVATE, ANON_SHARED, MAPPED_PRIVATE, MAPPED_SHARED, ELF_HEADERS = 1, 2, 4, 8, 16
HUGETLB_PRIVATE, HUGETLB_SHARED, DAX_PRIVATE, DAX_SHARED = 32, 64, 128, 256
ALL = 511

_WHOLE = 1 << 64
_ALWAYS = (b"[vdso]", b"[vvar]", b"[vvar_vclock]", b"[vsyscall]")


@dataclass
class _Area:
    """What proc_pid_smaps(5) tells of a mapping.

    Attributes:
        is_readable: by the process itself.
        is_own: it has pages that are the process's own, also where a file is mapped.
    """

    start: int
    offset: int
    has_file: bool
    path: bytes
    is_readable: bool
    is_own: bool = False
    shared: bool = False
    is_huge: bool = False


def narrowed(pages: Pages, mask: int) -> Head:
    """Return the head of the core that has the kinds of `mask` alone, and the same notes.

    Raises:
        PagesUnreadable: the kinds cannot be told.
    """
    head = pages.head
    with pages.opened() as (memory, _):
        # What the kernel left out is not looked into: a device, or memory that never comes.
        kept = {load.address for _, load, _ in head.segments() if load is not None and load.size}
        areas = (area for area in _areas(pages.task) if area.start in kept)
        most = {area.start: _most(area, mask, memory) for area in areas}
    table, place = bytearray(), head.data
    for raw, load, size_in_memory in head.segments():
        if load is None:
            table += raw
            continue
        if load.size and load.address not in most:
            raise PagesUnreadable(f"no mapping is seen at {load.address:#x}")
        size = min(load.size, most.get(load.address, 0))
        table += head.entry(raw, load.address, place, size, size_in_memory)
        place += size
    return head.narrowed(bytes(table), place)


def _most(area: _Area, mask: int, memory: Memory) -> int:
    """Return how many bytes of a mapping a core may have at most."""
    if area.path in _ALWAYS:
        return _WHOLE
    if area.path.startswith(b"/dev/dax"):
        return _WHOLE if mask & (DAX_SHARED if area.shared else DAX_PRIVATE) else 0
    if area.is_huge:
        return _WHOLE if mask & (HUGETLB_SHARED if area.shared else HUGETLB_PRIVATE) else 0
    if area.shared:  # of a file that has a name, or not
        # One that is there may be called so, too: then its crash decides for either kind.
        has_none = area.path.endswith(b" (deleted)")
        return _WHOLE if mask & (ANON_SHARED if has_none else MAPPED_SHARED) else 0
    if mask & ANON_PRIVATE and (area.is_own or not area.has_file):
        return _WHOLE
    if area.has_file and mask & MAPPED_PRIVATE:
        return _WHOLE
    # The kernel also has the first page of an executable file that is no ELF file. Of which mode
    # one is cannot be asked here: its disk may not answer.
    has_header = area.has_file and area.offset == 0 and area.is_readable and mask & ELF_HEADERS
    return PAGE if has_header and _is_elf(memory, area.start) else 0


def _is_elf(memory: Memory, address: int) -> bool:
    magic = bytearray(4)
    try:
        return memory.read(memoryview(magic), address) == 4 and magic == b"\x7fELF"
    except OSError:  # behind the end of its file
        return False


def _areas(task: int) -> Iterator[_Area]:
    """Give the mappings, one after the other: of tens of thousands this is tens of megabytes."""
    area = None
    try:
        with open(f"/proc/{task}/smaps", "rb") as smaps:  # noqa: PTH123 - no Path in the hold
            for line in smaps:
                if b"-" in line.partition(b" ")[0]:
                    if area is not None:
                        yield area
                    area = _area(line)
                elif area is not None and line.startswith((b"Anonymous:", b"Swap:")):
                    area.is_own |= line.split()[1] != b"0"
                elif area is not None and line.startswith(b"VmFlags:"):
                    flags = line.split()
                    area.is_huge = b"ht" in flags
                    # VM_SHARED; what may only be read of a file has VM_MAYSHARE, the `s` above.
                    area.shared = b"sh" in flags
    except OSError as error:
        raise PagesUnreadable(f"smaps: {error.strerror}") from error
    if area is not None:
        yield area


def _area(line: bytes) -> _Area:
    for one in mappings(line):
        path, has_file = one.path.rstrip(b"\n"), one.inode != b"0"
        return _Area(one.start, one.offset, has_file, path, one.access.startswith(b"r"))
    raise PagesUnreadable("smaps cannot be read")
