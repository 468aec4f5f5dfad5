"""Which of a process's files a module is made of."""

from collections.abc import Iterable

import drgn

from services.recorder.unwinding.backtrace import ModuleFile


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
