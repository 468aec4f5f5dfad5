"""The head of an ELF core: what killed the process, and how long its core will be.

Parses the first bytes of the stream and believes none of them. The kernel writes the ELF
header, the program headers, then the notes, the crashing thread's NT_PRSTATUS and NT_SIGINFO
among the first: fs/binfmt_elf.c, write_note_info(); elf(5).
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from crashbus import signals
from services.recorder.core import registers
from services.recorder.handover.hold import Hold, Stalled

MAX_PROGRAM_HEADERS = 16 * 1024 * 1024  # bytes; room for 290,000 mappings
_NOTES_WANTED = 64 * 1024  # the two notes come within the first KiB
_SHORTEST = 52  # bytes of an ELF header

_ET_CORE = 4
_PT_LOAD = 1
_PT_NOTE = 4
_PN_XNUM = 0xFFFF
_NT_PRSTATUS = 1
_NT_SIGINFO = 0x53494749

Read = Callable[[int], bytes]


@dataclass(frozen=True)
class Cause:
    """What siginfo says, sigaction(2). The sender is known for signals sent by a process."""

    signal: int
    code: int | None = None
    errno: int = 0
    fault_address: int | None = None
    sender_pid: int | None = None
    sender_uid: int | None = None


class Load(NamedTuple):
    """A piece of memory in a core: where it was, and where it is in the file, in bytes."""

    address: int
    offset: int
    size: int


class _Bad(Exception):
    """These bytes are not a core's."""


@dataclass(frozen=True)
class _Elf:
    """Sizes and layouts that differ between classes and byte orders."""

    order: str
    wide: bool
    machine: int = 0

    def header(self, raw: bytes) -> tuple[int, int, int, int]:
        """Return e_type, e_phoff, e_phentsize, e_phnum."""
        form = self.order + ("HHIQQQIHHH" if self.wide else "HHIIIIIHHH")
        fields = struct.unpack_from(form, raw, 16)
        return fields[0], fields[4], fields[8], fields[9]

    @property
    def header_size(self) -> int:
        return 64 if self.wide else 52

    @property
    def program_header(self) -> struct.Struct:
        return struct.Struct(self.order + ("IIQQQQQQ" if self.wide else "IIIIIIII"))

    def segment(self, fields: tuple[int, ...]) -> tuple[int, Load]:
        """Return p_type, and p_vaddr, p_offset and p_filesz."""
        if self.wide:
            return fields[0], Load(fields[3], fields[2], fields[5])
        return fields[0], Load(fields[2], fields[1], fields[4])


_NOTHING, _ELF64 = Load(0, 0, 0), _Elf("<", True)


@dataclass(frozen=True)
class Head:
    """What the first bytes of a core tell.

    Attributes:
        raw: these bytes, which belong to the core file.
        size: of the whole core in bytes, as announced; None where it is not.
        tid: the crashing thread in its own PID namespace.
        registers: of the crashing thread, as `registers.parse` names them.
        fault: what is wrong with the head, if anything.
        data: offset of the first piece of memory: everything before is headers and notes.
        notes: where all notes are in the file.
        sent: the table of program headers and the size that the kernel sent, where this is another.
    """

    raw: bytes
    size: int | None = None
    cause: Cause | None = None
    tid: int | None = None
    fault: str | None = None
    data: int = 0
    notes: Load = _NOTHING
    registers: dict[str, int] = field(default_factory=dict)
    sent: tuple[bytes, int | None] | None = None
    _elf: _Elf = _ELF64
    _table: tuple[int, int] = (0, 0)

    def loads(self) -> Iterator[Load]:
        """Give the pieces of memory that the core holds, in the order of its file."""
        for _, load, _ in self.segments():
            if load is not None and load.size:
                yield load

    def segments(self) -> Iterator[tuple[bytes, Load | None, int]]:
        """Give each program header: its bytes, and of a piece of memory, place and p_memsz."""
        start, end = self._table
        for place in range(start, end, self.entry_size):
            raw = self.raw[place : place + self.entry_size]
            fields = self._elf.program_header.unpack(raw)
            kind, load = self._elf.segment(fields)
            memory = fields[6] if self._elf.wide else fields[5]
            yield raw, load if kind == _PT_LOAD else None, memory

    @property
    def machine(self) -> int:
        """What it ran on: e_machine, elf(5)."""
        return self._elf.machine

    @property
    def program_counter(self) -> int | None:
        """Address of the instruction that the crashing thread was at."""
        return registers.program_counter(self.machine, self.registers)

    @property
    def order(self) -> str:
        """The byte order, as `struct` writes it."""
        return self._elf.order

    @property
    def entry_size(self) -> int:
        """Bytes of one program header."""
        return self._elf.program_header.size

    @property
    def table_size(self) -> int:
        """Bytes of all program headers."""
        return self._table[1] - self._table[0]

    def entry(self, raw: bytes, address: int, offset: int, size: int, memory: int) -> bytes:
        """Return a program header with other places and sizes, all in bytes."""
        layout = self._elf.program_header
        if self._elf.wide:
            kind, flags, *_, align = layout.unpack(raw)
            return layout.pack(kind, flags, offset, address, 0, size, memory, align)
        kind, *_, flags, align = layout.unpack(raw)
        return layout.pack(kind, offset, address, 0, size, memory, flags, align)

    def narrowed(self, table: bytes, size: int) -> "Head":
        """Return the head of a core with less memory, by a table of the same length."""
        start, end = self._table
        raw = self.raw[:start] + table + self.raw[end:]
        return replace(self, raw=raw, size=size, sent=(self.raw[start:end], self.size))

    def as_sent(self) -> "Head":
        """Return what the kernel sent, which is what its stream goes on with."""
        if self.sent is None:
            return self
        (table, size), (start, end) = self.sent, self._table
        raw = self.raw[:start] + table + self.raw[end:]
        return replace(self, raw=raw, size=size, sent=None)

    def with_table(self, offset: int, entries: int) -> bytes:
        """Return the ELF header, with another table of program headers and no sections."""
        header = bytearray(self.raw[: self._elf.header_size])
        if self._elf.wide:
            struct.pack_into(self.order + "QQ", header, 32, offset, 0)
            struct.pack_into(self.order + "HHHH", header, 56, entries, 0, 0, 0)
        else:
            struct.pack_into(self.order + "II", header, 28, offset, 0)
            struct.pack_into(self.order + "HHHH", header, 44, entries, 0, 0, 0)
        return bytes(header)


def read(read_bytes: Read) -> Head:
    """Read and parse the head of a core; a strange head is told, not raised.

    Args:
        read_bytes: returns that many bytes of the stream, fewer only at its end.
    """
    taken = bytearray()

    def until(size: int) -> bytes:
        if size > len(taken):
            taken.extend(read_bytes(size - len(taken)))
        if size > len(taken):
            raise _Bad(f"it ends after {len(taken)} bytes")
        return bytes(taken[:size])

    size: int | None = None
    try:
        elf, table, count = _table(until)
        size, notes, data = _segments(elf, until(table + count), table)
        end = notes.offset + min(notes.size, _NOTES_WANTED)
        if len(taken) < end <= data <= end + _NOTES_WANTED:  # at once: each read takes its time
            taken.extend(read_bytes(data - len(taken)))
        told = _told(elf, until(end)[notes.offset :])
    except (_Bad, struct.error) as error:
        return Head(bytes(taken), size, fault=f"the core's head cannot be read: {error}")
    return Head(
        bytes(taken),
        size,
        told.cause,
        told.tid,
        data=data,
        notes=notes,
        registers=told.registers,
        _elf=elf,
        _table=(table, table + count),
    )


def from_hold(hold: Hold) -> Head:
    """Read the head of a core that the kernel sends."""
    try:
        return read(hold.read_exactly)
    except (Stalled, OSError) as error:
        return Head(b"", fault=f"no core came: {error}")


def _table(until: Read) -> tuple[_Elf, int, int]:
    """Return where the program headers begin, and their size in bytes."""
    ident = until(_SHORTEST)
    if ident[:4] != b"\x7fELF" or ident[4] not in (1, 2) or ident[5] not in (1, 2):
        raise _Bad("it is no ELF file")
    order = "<" if ident[5] == 1 else ">"
    (machine,) = struct.unpack_from(order + "H", ident, 18)
    elf = _Elf(order, ident[4] == 2, machine)
    kind, offset, entry, count = elf.header(until(elf.header_size))
    if kind != _ET_CORE or entry != elf.program_header.size:
        raise _Bad("it is no core")
    if offset > MAX_PROGRAM_HEADERS:
        raise _Bad("its program headers are too far away")
    if count == _PN_XNUM:
        # The true number stands at the very end of the file, but the notes follow the table.
        first = elf.program_header.unpack_from(until(offset + entry), offset)
        count = max(0, elf.segment(first)[1].offset - offset) // entry
    if offset + count * entry > MAX_PROGRAM_HEADERS:
        raise _Bad(f"its {count} program headers are too many")
    return elf, offset, count * entry


def _segments(elf: _Elf, raw: bytes, table: int) -> tuple[int, Load, int]:
    """Return the core's size, its notes, and where its memory begins.

    The pieces must follow each other, as the kernel lays them out; the notes of a core that was
    laid out anew, `core_reduced`, lie before the table.
    """
    size, notes, data, are_before = len(raw), None, 0, False
    for fields in elf.program_header.iter_unpack(raw[table:]):
        kind, segment = elf.segment(fields)
        if kind == _PT_NOTE and notes is None:
            notes = segment
            are_before = elf.header_size < segment.offset + segment.size <= table
            if are_before:
                continue
        if segment.size and segment.offset < size:
            raise _Bad("its segments overlap")
        if kind == _PT_LOAD and segment.size and not data:
            data = segment.offset
        if segment.size:
            size = segment.offset + segment.size
    are_behind = notes is not None and len(raw) <= notes.offset <= len(raw) + _NOTES_WANTED
    if notes is None or not (are_before or are_behind):
        raise _Bad("its notes are not where they should be")
    return size, notes, data or size


@dataclass
class _Told:
    """What the notes say of the crashing thread."""

    cause: Cause | None = None
    tid: int | None = None
    registers: dict[str, int] = field(default_factory=dict)


def _told(elf: _Elf, notes: bytes) -> _Told:
    told = _Told()
    for kind, body in _notes(elf.order, notes):
        if kind == _NT_PRSTATUS and told.tid is None:
            # struct elf_siginfo, short pr_cursig, two longs of signal sets, pid_t pr_pid.
            (current,) = struct.unpack_from(elf.order + "h", body, 12)
            (told.tid,) = struct.unpack_from(elf.order + "i", body, 32 if elf.wide else 24)
            told.cause = Cause(current) if 0 < current <= 64 else None
            told.registers = registers.parse(elf.machine, elf.order, body)
        elif kind == _NT_SIGINFO:
            told.cause = _siginfo(elf, body) or told.cause
            break
    return told


def _notes(order: str, raw: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place + 12 <= len(raw):
        name, size, kind = struct.unpack_from(order + "III", raw, place)
        body = place + 12 + (name + 3) // 4 * 4
        if raw[place + 12 : place + 12 + name].rstrip(b"\0") == b"CORE":
            yield kind, raw[body : body + size]
        place = body + (size + 3) // 4 * 4


def _siginfo(elf: _Elf, body: bytes) -> Cause | None:
    number, errno, code = struct.unpack_from(elf.order + "iii", body)
    if not 0 < number <= 64:
        return None
    union = 16 if elf.wide else 12
    (address,) = struct.unpack_from(elf.order + ("Q" if elf.wide else "I"), body, union)
    pid, uid = struct.unpack_from(elf.order + "iI", body, union)
    has_address, has_sender = signals.has_fault_address(number, code), signals.has_sender(code)
    return Cause(
        signal=number,
        code=code,
        errno=errno,
        fault_address=address if has_address else None,
        sender_pid=pid if has_sender else None,
        sender_uid=uid if has_sender else None,
    )
