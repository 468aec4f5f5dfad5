"""A system root made of a crash's own binaries, so that gdb shows names on any machine.

::

    sysroot/usr/bin/program              each file where the process had it
    lib/libfoo.so.1                      libraries by the names that other binaries know them by
    debug/.build-id/<xx>/<rest>.debug    debug information

https://sourceware.org/gdb/current/onlinedocs/gdb.html/Files.html
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

from crashbus import elf
from crashbus.cli.download import is_whole, save
from crashbus.cli.errors import Trouble
from crashbus.cli.lookup import Found
from crashbus.cli.terminal import plain
from crashbus.layout import Kind
from crashbus.parts import CrashFile, Module

# Whoever has a lease on a file lets others wait for it, for up to /proc/sys/fs/lease-break-time,
# fcntl(2), F_SETLEASE.
_NO_WAIT = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_DELETED = " (deleted)"  # proc_pid_maps(5)
# The binaries are whoever's that crashed: gdb runs no script out of them or beside them, also where
# its user trusts all directories; those that came with it show what containers of C++ hold.
_SCRIPTS = (
    "set auto-load off",
    "set auto-load python-scripts on",
    "set auto-load safe-path $datadir/auto-load",
    "set auto-load scripts-directory $datadir/auto-load",
)


@dataclass
class Sysroot:
    """What was built.

    Attributes:
        modules: how many binaries are in it.
        missing: what could not be had, in words.
    """

    directory: Path
    executable: Path | None = None
    modules: int = 0
    missing: list[str] = field(default_factory=list)

    @property
    def gdb_arguments(self) -> list[str]:
        """What makes gdb use it, and no binary of this machine."""
        settings = {
            "sysroot": self.directory / "sysroot",
            "solib-search-path": self.directory / "lib",
            "debug-file-directory": f"{self.directory / 'debug'}:/usr/lib/debug",
        }
        commands = (*_SCRIPTS, *(f"set {k} {v}" for k, v in settings.items()))
        arguments = [part for command in commands for part in ("-iex", command)]
        return [*arguments, *([f"--se={self.executable}"] if self.executable else [])]


def build(found: Found, directory: Path) -> Sysroot:
    """Fetch the binaries of a crash into a directory; what cannot be had is told."""
    manifest = found.crash.manifest
    made = Sysroot(directory.resolve())
    for module in manifest.modules if manifest else ():
        try:
            place = _place(module, made.directory / "sysroot")
            binary = _binary(found, module, made.directory / "binaries")
            _link(made, binary, place)
            for name in (place.name, _soname(binary)):
                if name:
                    _link(made, binary, made.directory / "lib" / name)
        except (Trouble, OSError) as error:
            made.missing.append(plain(f"{module.path} is missing: {error}"))
            continue
        made.modules += 1
        if manifest and _plain_path(module.path) == _plain_path(manifest.process.executable or ""):
            made.executable = place
        made.missing.extend(_add_debuginfo(found, module, made))
    return made


def _plain_path(path: str) -> str:
    return path.removesuffix(_DELETED)


def _place(module: Module, root: Path) -> Path:
    """Return where a module goes; its path was written by whoever crashed."""
    path = PurePosixPath(_plain_path(module.path))
    steps = path.parts[1:]
    if not path.is_absolute() or not steps or not all(map(_is_step, steps)):
        raise Trouble("it cannot be placed below a directory", "open it by hand, by its build ID")
    return root.joinpath(*steps)


def _is_step(name: str) -> bool:
    """Tell whether a name leads one step down a tree, and nowhere else."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()


def _open_file(path: Path) -> BinaryIO:
    """Open a file of this machine; the path was written by whoever crashed.

    Raises:
        OSError, ValueError: it cannot be opened, or not at once.
    """
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # To open a device may do something: /dev/watchdog begins to count down to a reboot.
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        return os.fdopen(os.open(f"/proc/self/fd/{found}", _NO_WAIT), "rb")
    finally:
        os.close(found)


def _build_id(path: Path) -> str | None:
    try:
        with _open_file(path) as file:
            return elf.build_id(file.fileno())
    except (OSError, ValueError):
        return None


def _binary(found: Found, module: Module, directory: Path) -> Path:
    """Return the module's file: this machine's own if it is of the same build, else fetched."""
    own = Path(_plain_path(module.path))
    if _build_id(own) == module.build_id:
        return own
    for file_ in module.files():
        if file_.kind is Kind.EXECUTABLE:
            return _fetch(found, file_, directory)
    raise Trouble("the crash's host did not keep it", "set CRASHBUS_RECORDER_MAX_BINARY_BYTES")


def _fetch(found: Found, file: CrashFile, directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / file.name
    return path if is_whole(path, file) else save(found, file, directory, lambda _: None)


def _add_debuginfo(found: Found, module: Module, made: Sysroot) -> Iterator[str]:
    for file in module.files():
        if file.kind is Kind.DEBUGINFO:
            folder = made.directory / "debug" / ".build-id" / module.build_id[:2]
            try:
                fetched = _fetch(found, file, made.directory / "binaries")
                _link(made, fetched, folder / f"{module.build_id[2:]}.debug")
            except (Trouble, OSError) as error:
                yield plain(f"debug information of {module.path} is missing: {error}")


def _link(made: Sysroot, binary: Path, place: Path) -> None:
    """Give a binary a further name; of two that want the same, the first has it.

    gdb shows what a symbolic link leads to, and looks for its own scripts by that: right for what
    is this machine's own.
    """
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        if made.directory in binary.parents:
            place.hardlink_to(binary)
        else:
            place.symlink_to(binary)


def _soname(path: Path) -> str | None:
    """Return DT_SONAME of a library, elf(5), if it can be a file's name."""
    try:
        with _open_file(path) as file:
            for segment in ELFFile(file).iter_segments("PT_DYNAMIC"):
                assert isinstance(segment, DynamicSegment)
                for tag in segment.iter_tags("DT_SONAME"):
                    name = str(getattr(tag, "soname", ""))
                    return name if _is_step(name) else None
    except Exception:  # noqa: BLE001 - a hostile file makes the library raise anything
        return None
    return None
