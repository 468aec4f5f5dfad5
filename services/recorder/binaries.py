"""The programs and libraries of a crashed process, kept so that its core opens anywhere.

Each is copied to ``<spool>/build-id`` once for each build ID and content (what has no build ID is
named by content alone); the collector ships it from there, once for each destination. Debug
information of this host, where it has some, is kept beside it.
"""

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from crashbus import elf, layout
from crashbus.layout import Kind
from crashbus.parts import MAX_MODULES, Binary, Module, Supplement
from services.common import crash_directory
from services.common.crash_directory import SpoolUnusable
from services.recorder import file_systems, metrics
from services.recorder.modules import Module as MappedModule
from services.recorder.unwinding import debug_files
from services.recorder.unwinding.debug_files import Link

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_BLOCK = 1024 * 1024
_MAX_PATH = 1024  # characters told of a path
_MAX_REMEMBERED = 10_000  # files whose hash is known
_BUILD_ID = re.compile(r"(?:[0-9a-f]{2}){2,64}")  # as elf tells it; here a worker has read it
_NONE: Mapping[int, str] = {}


class Binaries:
    """Keeps binaries in the spool; used by several threads.

    Args:
        max_bytes: of one file; larger ones are left where they are, 0: keep none.
        reserve: percent of the spool's disk to leave free.
        debug_directories: where debug information of them may be.
    """

    def __init__(
        self,
        spool: Path,
        max_bytes: int,
        reserve: float,
        debug_directories: tuple[Path, ...] = (Path("/usr/lib/debug"),),
    ) -> None:
        self._spool = spool
        self._max_bytes = max_bytes
        self._reserve = reserve
        self._debug_directories = debug_directories
        self._known: dict[tuple[Kind | int, ...], Binary] = {}  # by what fstat(2) says, too

    def keep(
        self, modules: tuple[MappedModule, ...], build_ids: Mapping[int, str] = _NONE
    ) -> tuple[Module, ...]:
        """Return what the modules are, each kept if that can be; without a build ID, what is not
        kept cannot be told either.

        Args:
            build_ids: by where a module begins, of those that are not local, which are not read.
        """
        found = [one for one in modules if _is_binary(one)][:MAX_MODULES]
        directory = self._directory() if found and self._max_bytes else -1
        try:
            told = [self._told(one, build_ids.get(one.start), directory) for one in found]
        finally:
            if directory >= 0:
                os.close(directory)
        return tuple(one for one in told if one is not None)

    def _directory(self) -> int:
        try:
            return crash_directory.own_directory(self._spool, layout.BINARIES)
        except SpoolUnusable as error:
            log.warning("binaries are not kept", error=str(error))
            return -1

    def _told(self, mapped: MappedModule, build_id: str | None, directory: int) -> Module | None:
        if mapped.is_local:
            return self._keep(mapped, directory)
        if build_id is None or not _BUILD_ID.fullmatch(build_id):
            return None
        return self._of_build(mapped.path[:_MAX_PATH], build_id, -1, directory)

    def _keep(self, mapped: MappedModule, directory: int) -> Module | None:
        path, build_id = mapped.path[:_MAX_PATH], elf.build_id(mapped.file)
        if build_id is not None:
            return self._of_build(path, build_id, mapped.file, directory)
        executable = self._kept(Kind.EXECUTABLE, path, None, mapped.file, directory)
        if executable is None:
            return None
        stand_in = layout.stand_in_build_id(executable.sha256)
        return Module(path=path, build_id=stand_in, has_build_id=False, kept=(executable,))

    def _of_build(self, path: str, build_id: str, file: int, directory: int) -> Module:
        executable, debug, supplement = None, None, None
        if file >= 0:
            executable = self._kept(Kind.EXECUTABLE, path, build_id, file, directory)
        link = debug_files.link_of(file) if executable else None  # a read of it ends
        with debug_files.opened(self._debug_directories, build_id) as found:
            if found >= 0:
                debug = self._kept(Kind.DEBUGINFO, path, build_id, found, directory)
                link = debug_files.link_of(found)
        if link is not None:
            supplement = self._supplement(path, link, directory)
        kept = tuple(one for one in (executable, debug) if one)
        return Module(path=path, build_id=build_id, kept=kept, supplement=supplement)

    def _supplement(self, path: str, link: Link, directory: int) -> Supplement | None:
        with debug_files.opened_supplement(self._debug_directories, link) as found:
            if found < 0:
                return None
            kept = self._kept(Kind.DEBUGINFO, path, link.build_id, found, directory)
        return Supplement(build_id=link.build_id, kept=kept) if kept else None

    def _kept(
        self, kind: Kind, path: str, build_id: str | None, file: int, directory: int
    ) -> Binary | None:
        if directory < 0:
            return None
        try:
            return self._stored(kind, build_id, file, directory)
        except OSError as error:
            log.warning("a binary is not kept", path=path, error=error.strerror)
            return None

    def _stored(self, kind: Kind, build_id: str | None, file: int, directory: int) -> Binary | None:
        status = os.fstat(file)
        disk = os.fstatvfs(directory)
        room = (disk.f_bavail - disk.f_blocks * self._reserve / 100) * disk.f_frsize
        regular = stat.S_ISREG(status.st_mode) and file_systems.is_local(file)
        if not regular or status.st_size > self._max_bytes:
            return None
        times = status.st_mtime_ns, status.st_ctime_ns
        key = (kind, status.st_dev, status.st_ino, status.st_size, *times)
        known = self._known.get(key)
        if known:
            name = _name(kind, build_id, known.sha256)
            if crash_directory.has_file(name, directory):
                return known
        if status.st_size > room:
            return None
        binary = _copy(kind, build_id, file, status.st_size, directory)
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[key] = binary
        return binary


def _is_binary(mapped: MappedModule) -> bool:
    return mapped.file >= 0 and (not mapped.is_local or elf.is_elf(mapped.file))


def _name(kind: Kind, build_id: str | None, sha256: str) -> str:
    return layout.binary_name(kind, build_id or layout.stand_in_build_id(sha256), sha256)


def _copy(kind: Kind, build_id: str | None, file: int, size: int, directory: int) -> Binary:
    """Copy a file under the name that its content gives it."""
    hidden, copy = crash_directory.hidden_file(kind, directory)
    digest, done = hashlib.sha256(), 0
    try:
        # Not beyond the size at the start: it may grow for as long as we read.
        while done < size and (block := os.pread(file, min(_BLOCK, size - done), done)):
            digest.update(block)
            _write(copy, block)
            done += len(block)
        name = _name(kind, build_id, digest.hexdigest())
        crash_directory.name_file(hidden, name, directory)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(hidden, dir_fd=directory)
        raise
    finally:
        os.close(copy)
    metrics.BINARIES.inc()
    return Binary(kind=kind, size=done, sha256=digest.hexdigest())


def _write(file: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(file, view) :]
