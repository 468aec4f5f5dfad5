"""A system root made of a crash's own binaries, so that gdb shows names on any machine.

::

    sysroot/usr/bin/program              each file where the process had it
    lib/libfoo.so.1                      libraries by the names that other binaries know them by
    debug/.build-id/<xx>/<rest>          each file by its build ID
    debug/.build-id/<xx>/<rest>.debug    debug information

https://sourceware.org/gdb/current/onlinedocs/gdb.html/Files.html
"""

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

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
# Directories that lie below /usr, and in / as links there, file-hierarchy(7): mappings have the one
# name of a library, the list that the dynamic linker keeps may have the other.
_MERGED = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")


@dataclass
class Sysroot:
    """What was built.

    Attributes:
        missing: what could not be had, in words.
        links: the symbolic ones; others that are found were made before, and where they lead to
            may have changed since.
    """

    directory: Path
    executable: Path | None = None
    missing: list[str] = field(default_factory=list)
    links: set[Path] = field(default_factory=set)

    @property
    def gdb_arguments(self) -> list[str]:
        """What makes gdb use it, and no binary of this machine."""
        settings = {
            "sysroot": self.directory / "sysroot",
            "solib-search-path": self.directory / "lib",
            "debug-file-directory": f"{self.directory / 'debug'}:/usr/lib/debug",
        }
        commands = (f"set {k} {v}" for k, v in settings.items())
        return [*NO_SCRIPTS, *_before_all(*commands), *_program(self.executable)]


def of_this_machine(executable: Path | None) -> list[str]:
    """Return what has gdb use this machine's binaries, none of them known to be the right one."""
    return [*NO_SCRIPTS, *_program(executable)]


def _before_all(*commands: str) -> list[str]:
    """Return arguments that have gdb obey before it loads anything."""
    return [part for command in commands for part in ("-iex", command)]


def _program(executable: Path | None) -> list[str]:
    return [f"--se={executable}"] if executable else []


NO_SCRIPTS = _before_all(*_SCRIPTS)


def build(found: Found, directory: Path) -> Sysroot:
    """Fetch the binaries of a crash into a directory; what cannot be had is told."""
    manifest = found.crash.manifest
    made = Sysroot(directory.resolve())
    aliases: list[tuple[Path, Path]] = []
    for module in manifest.modules if manifest else ():
        try:
            place = _place(module, made.directory / "sysroot")
            binary = _binary(found, module, made.directory / "binaries")
            if module.has_build_id:
                _link_build(made, module.build_id, binary)
            if not _link(made, binary, place):
                made.missing.append(_beside_another(module))
                continue
        except (Trouble, OSError) as error:
            made.missing.append(plain(f"{module.path} is missing: {error}"))
            continue
        aliases.extend((binary, alias) for alias in _aliases(made, binary, place))
        if manifest and _plain_path(module.path) == _plain_path(manifest.process.executable or ""):
            made.executable = place
        made.missing.extend(_add_debuginfo(found, module, made))
    _add_aliases(made, aliases)
    return made


def _beside_another(module: Module) -> str:
    """Tell of a file that was replaced while it was mapped, or of a directory used before."""
    return plain(
        f"{module.path} of build {module.build_id} is left out: another file of that name is "
        "there; its frames may show wrong names"
    )


def _aliases(made: Sysroot, binary: Path, place: Path) -> Iterator[Path]:
    """Give the further names by which gdb may look for a file: links are not in the mappings.

    What is this machine's own gdb finds below its search path: only there it looks where a link
    leads to, and the scripts of libstdc++ need to know.
    """
    root, library = made.directory / "sysroot", made.directory / "lib"
    tree = root if _is_fetched(made, binary) else library
    for name in dict.fromkeys((place.name, _soname(binary) or place.name)):
        top, *rest = steps = place.relative_to(root).with_name(name).parts
        yield tree.joinpath(*steps)
        if top == "usr" and len(rest) > 1 and rest[0] in _MERGED:
            yield tree.joinpath(*rest)
        yield library / name


def _is_fetched(made: Sysroot, binary: Path) -> bool:
    return made.directory in binary.parents


def _add_aliases(made: Sysroot, aliases: list[tuple[Path, Path]]) -> None:
    """Add what names are free, once all files are where the process had them."""
    for binary, alias in aliases:
        with suppress(OSError):  # a file lies where a directory would be: there was no such name
            _link(made, binary, alias)


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


def _open_file(path: Path) -> io.BufferedReader:
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


def _binary(found: Found, module: Module, directory: Path) -> Path:
    """Return the module's file: this machine's own if it is the same one, else fetched."""
    kept = next((one for one in module.files() if one.kind is Kind.EXECUTABLE), None)
    own = Path(_plain_path(module.path))
    if _is_same(own, module, kept):
        return own
    if kept is None:
        raise Trouble("the crash's host did not keep it", "set CRASHBUS_RECORDER_MAX_BINARY_BYTES")
    return _fetch(found, kept, directory)


def _is_same(own: Path, module: Module, kept: CrashFile | None) -> bool:
    """Tell whether a file of this machine is the module: by its content where that is told, since
    whoever crashed may have given a program the build ID of another.
    """
    try:
        with _open_file(own) as file:
            if kept is None:
                return module.has_build_id and elf.build_id(file.fileno()) == module.build_id
            # Of the same size first: some files in /proc have none, and no end.
            size = os.fstat(file.fileno()).st_size
            return 0 < size == kept.size and _sha256(file) == kept.sha256
    except (OSError, ValueError):
        return False


def _sha256(file: io.BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(found: Found, file: CrashFile, directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / file.name
    return path if is_whole(path, file) else save(found, file, directory, lambda _: None)


def _add_debuginfo(found: Found, module: Module, made: Sysroot) -> Iterator[str]:
    for build_id, file in module.files_by_build():
        if file.kind is Kind.DEBUGINFO:
            try:
                fetched = _fetch(found, file, made.directory / "binaries")
                _link_build(made, build_id, fetched, ".debug")
            except (Trouble, OSError) as error:
                yield plain(f"debug information of {module.path} is missing: {error}")


def _link_build(made: Sysroot, build_id: str, binary: Path, ending: str = "") -> None:
    """Give a file the name that its build ID has; of two contents, the first has it."""
    folder = made.directory / "debug" / ".build-id" / build_id[:2]
    _link(made, binary, folder / f"{build_id[2:]}{ending}")


def _link(made: Sysroot, binary: Path, place: Path) -> bool:
    """Give a binary a further name; of two that want the same, the first has it.

    gdb shows what a symbolic link leads to, and looks for its own scripts by that: right for what
    is this machine's own.

    Returns:
        whether it has it.
    """
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if place.is_symlink() and place not in made.links:
        place.unlink()
    try:
        if _is_fetched(made, binary):
            place.hardlink_to(binary)
        else:
            place.symlink_to(binary)
            made.links.add(place)
    except FileExistsError:
        return place.samefile(binary) or _same_content(place, binary)
    return True


def _same_content(one: Path, other: Path) -> bool:
    with _open_file(one) as first, _open_file(other) as second:
        return _sha256(first) == _sha256(second)


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
