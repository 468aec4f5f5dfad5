"""The head of an ELF core: what killed the process, and how long its core will be.

Parses the first bytes of the stream and believes none of them. The kernel writes the ELF
header, the program headers, then the notes, the crashing thread's NT_PRSTATUS and NT_SIGINFO
among the first: fs/binfmt_elf.c, write_note_info(); elf(5).
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from crashbus import signals

MAX_PROGRAM_HEADERS = 16 * 1024 * 1024  # bytes; room for 290,000 mappings
_NOTES_WANTED = 64 * 1024  # the two notes come within the first KiB

_ET_CORE = 4
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


@dataclass(frozen=True)
class Head:
    """What the first bytes of a core tell.

    Attributes:
        raw: these bytes, which belong to the core file.
        size: of the whole core in bytes, as announced; None where it is not.
        tid: the crashing thread in its own PID namespace.
        fault: what is wrong with the head, if anything.
    """

    raw: bytes
    size: int | None = None
    cause: Cause | None = None
    tid: int | None = None
    fault: str | None = None


class _Bad(Exception):
    """These bytes are not a core's."""


@dataclass(frozen=True)
class _Elf:
    """Sizes and layouts that differ between classes and byte orders."""

    order: str
    wide: bool

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

    def segment(self, fields: tuple[int, ...]) -> tuple[int, int, int]:
        """Return p_type, p_offset, p_filesz."""
        return (fields[0], fields[2], fields[5]) if self.wide else (fields[0], fields[1], fields[4])


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
        size, notes, notes_size = _segments(elf, until(table + count), table)
        end = notes + min(notes_size, _NOTES_WANTED)
        cause, tid = _cause(elf, until(end)[notes:])
    except (_Bad, struct.error) as error:
        return Head(bytes(taken), size, fault=f"the core's head cannot be read: {error}")
    return Head(bytes(taken), size, cause, tid)


def _table(until: Read) -> tuple[_Elf, int, int]:
    """Return where the program headers begin, and their size in bytes."""
    ident = until(16)
    if ident[:4] != b"\x7fELF" or ident[4] not in (1, 2) or ident[5] not in (1, 2):
        raise _Bad("it is no ELF file")
    elf = _Elf("<" if ident[5] == 1 else ">", ident[4] == 2)
    kind, offset, entry, count = elf.header(until(elf.header_size))
    if kind != _ET_CORE or entry != elf.program_header.size:
        raise _Bad("it is no core")
    if count == _PN_XNUM:
        # The true number stands at the very end of the file, but the notes follow the table.
        first = elf.program_header.unpack_from(until(offset + entry), offset)
        count = max(0, elf.segment(first)[1] - offset) // entry
    if offset + count * entry > MAX_PROGRAM_HEADERS:
        raise _Bad(f"its {count} program headers are too many")
    return elf, offset, count * entry


def _segments(elf: _Elf, raw: bytes, table: int) -> tuple[int, int, int]:
    """Return the core's size, and offset and size of its notes."""
    size = notes = notes_size = 0
    for fields in elf.program_header.iter_unpack(raw[table:]):
        kind, offset, length = elf.segment(fields)
        size = max(size, offset + length)
        if kind == _PT_NOTE and not notes:
            notes, notes_size = offset, length
    if not len(raw) <= notes <= len(raw) + _NOTES_WANTED:
        raise _Bad("its notes are not where they should be")
    return size, notes, notes_size


def _cause(elf: _Elf, notes: bytes) -> tuple[Cause | None, int | None]:
    cause, tid = None, None
    for kind, body in _notes(elf.order, notes):
        if kind == _NT_PRSTATUS and tid is None:
            # struct elf_siginfo, short pr_cursig, two longs of signal sets, pid_t pr_pid.
            (current,) = struct.unpack_from(elf.order + "h", body, 12)
            (tid,) = struct.unpack_from(elf.order + "i", body, 32 if elf.wide else 24)
            cause = cause or (Cause(current) if 0 < current <= 64 else None)
        elif kind == _NT_SIGINFO:
            return _siginfo(elf, body) or cause, tid
    return cause, tid


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
