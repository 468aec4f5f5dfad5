"""Which of a process's files a module is made of."""

import os
import struct
from collections.abc import Iterable
from contextlib import suppress

import drgn

from services.recorder.unwinding.backtrace import ModuleFile
from services.recorder.unwinding.sections import sections_of

_NOTE, _LONGEST_NOTE = b".note.gnu.build-id", 256  # bytes
_NOTE_HEAD = struct.Struct("<III4s")  # ElfXX_Nhdr and the name, GNU


def with_build_ids(files: Iterable[ModuleFile]) -> tuple[ModuleFile, ...]:
    """Return files with their build IDs, as far as they have sections that tell them."""
    return tuple(file.model_copy(update={"build_id": _build_id(file.file)}) for file in files)


def _build_id(file: int) -> str | None:
    _, offset, size = sections_of(file).get(_NOTE, (0, 0, 0))
    with suppress(OSError, OverflowError, struct.error):
        note = os.pread(file, min(size, _LONGEST_NOTE), offset)
        _, length, *_ = _NOTE_HEAD.unpack_from(note)
        return note[_NOTE_HEAD.size :][:length].hex() or None
    return None


def bounds(module: drgn.Module) -> tuple[int, int] | None:
    """Return where a module begins and ends; between its parts there may be gaps, for alignment."""
    parts = module.address_ranges
    return (min(low for low, _ in parts), max(high for _, high in parts)) if parts else None


def file_of(module: drgn.Module, files: Iterable[ModuleFile]) -> ModuleFile | None:
    """Return the file of a module.

    A file may be mapped more than once, by dlmopen(3) or to read its symbols. Others lie between
    then, within its bounds: what tells them apart is the build ID, or else who begins last.
    """
    found = bounds(module)
    build_id = module.build_id.hex() if module.build_id else None
    around = (
        file
        for file in files
        if (found and file.start <= found[0] < file.end) or module.name == file.path
    )
    return max(around, key=lambda file: (file.build_id == build_id, file.start), default=None)
