"""The spool: ``/tmp/appscope/<pid>/``, made safe in a directory that everyone can write to.

AppScope's library makes the same directories, as any user, and spins when it cannot write
there (a PID comes again), so they stay open to all; but root owns them and they are sticky:
nobody can remove or rename what is not theirs. Everything
below the spool's root is reached through descriptors and never through a link. Our own files
belong to root and are read by root alone (0600): a backtrace and a snapshot can tell secrets.
"""

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from crashbus import layout
from crashbus.errors import CrashbusError
from services.common import metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()

OPEN_TO_ALL = 0o1777
_EPOCHS_TRIED = 64  # AppScope writes one set a second at most
_TRIES = 64  # an attacker can swap a directory under us as long as it is not root's
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_EXCHANGE = 2  # renameat2(2)
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class SpoolUnusable(CrashbusError):
    """The spool, or a directory in it, cannot be had.

    Attributes:
        mend: what a human can do about it.
    """

    def __init__(self, error: str, mend: str) -> None:
        super().__init__(error)
        self.mend = mend


def open_spool(path: Path) -> int:
    """Return a descriptor of the spool's root, made ours if it is not.

    Raises:
        SpoolUnusable: it cannot be had.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return _own_directory(path.name, parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise _unusable(path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    spool = open_spool(path)
    try:
        yield spool
    finally:
        os.close(spool)


def open_crash(path: Path, pid: int, epoch: int) -> tuple[int, int]:
    """Return a descriptor of ``<spool>/<pid>``, and the first epoch from `epoch` on that is
    free there; where others have taken them all, the first that root has not.

    Raises:
        SpoolUnusable: it cannot be had.
    """
    with _opened(path) as spool:
        try:
            for _ in range(_TRIES):
                directory = _own_directory(str(pid), spool)
                free = _free_epoch(directory, epoch)
                if free is not None:
                    return directory, free
                os.close(directory)
                # What lies there is not seen again, so only root can bring that about.
                _put_aside(str(pid), spool, "it is full of crash files")
            raise OSError(None, "it fills up faster than it can be put aside")
        except OSError as error:
            raise _unusable(path / str(pid), error) from error


def own_directory(path: Path, name: str) -> int:
    """Return a descriptor of a directory in the spool, made ours if it is not.

    Raises:
        SpoolUnusable: the spool cannot be had.
        OSError: the directory cannot.
    """
    with _opened(path) as spool:
        return _own_directory(name, spool)


def private_directory(path: Path, name: str) -> int:
    """Return a descriptor of a directory in the spool that root alone can enter.

    Whatever else has the name is put aside: nothing in it is to be believed.

    Raises:
        SpoolUnusable: the spool cannot be had.
        OSError: the directory cannot.
    """
    with _opened(path) as spool:
        for _ in range(_TRIES):
            directory = _directory(name, spool)
            if directory is None:
                continue
            if _is_private_directory(os.fstat(directory)):
                return directory
            os.close(directory)
            _put_aside(name, spool, "it is not root's alone")
    raise OSError(None, "it is swapped again and again")


def existing_private_directory(path: Path, name: str) -> int:
    """Return a descriptor of what `private_directory` made.

    Raises:
        FileNotFoundError: it is not there; what another user made in its place is none.
        OSError: it cannot be had.
    """
    directory = os.open(path / name, _DIRECTORY)
    if _is_private_directory(os.fstat(directory)):
        return directory
    os.close(directory)
    raise FileNotFoundError(errno.ENOENT, "it is not root's alone", str(path / name))


def private_file(path: Path, name: str) -> int:
    """Return a descriptor of a file in the spool that root alone can open, made if it is missing.

    Whatever else has the name is put aside.

    Raises:
        SpoolUnusable: the spool cannot be had.
        OSError: the file cannot.
    """
    with _opened(path) as spool:
        return _private_file(name, spool)


def _private_file(name: str, spool: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for _ in range(_TRIES):
        try:
            file = os.open(name, flags, 0o600, dir_fd=spool)
        except OSError as error:
            # A link, a directory, a FIFO, or another user's, proc_sys_fs(5), protected_regular.
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
                raise
        else:
            if _is_private(os.fstat(file)):
                return file
            os.close(file)
        _put_aside(name, spool, "it is not root's alone")
    raise OSError(None, "it is swapped again and again")


def _is_private_directory(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700


def _is_private(status: os.stat_result) -> bool:
    ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
    return ours and stat.S_IMODE(status.st_mode) == 0o600


def has_file(name: str, directory: int) -> bool:
    """Tell whether a file is there that we made."""
    return _is_our_file(name, directory)


def hidden_file(kind: layout.Kind, directory: int) -> tuple[str, int]:
    """Make a file that nobody looks at until `name_file`; return its name and descriptor."""
    name = f".{kind}.{secrets.token_hex(8)}"
    return name, _new_file(name, directory)


def name_file(hidden: str, name: str, directory: int) -> None:
    """Give a hidden file its name, unless a file of ours has it already.

    Raises:
        OSError: it cannot have it.
    """
    if _is_our_file(name, directory):
        os.unlink(hidden, dir_fd=directory)
    else:
        _take_place(name, hidden, directory)


def create_file(directory: int, kind: layout.Kind, epoch: int) -> int:
    """Make a crash file and return its descriptor.

    What another user put in its place is put aside: anybody can guess the name once the
    capture record shows the epoch.

    Raises:
        OSError: root's own file is there already, or there is no room.
    """
    name = layout.crash_file_name(kind, epoch)
    try:
        return _new_file(name, directory)
    except FileExistsError:
        if _is_our_file(name, directory):
            raise
    aside = _aside(name)
    descriptor = _new_file(aside, directory)
    try:
        _take_place(name, aside, directory)
    except OSError:
        os.close(descriptor)
        os.unlink(aside, dir_fd=directory)
        raise
    return descriptor


def _new_file(name: str, directory: int) -> int:
    descriptor = os.open(name, _NEW_FILE, 0o600, dir_fd=directory)
    os.fchmod(descriptor, 0o600)  # whatever the umask
    return descriptor


def _is_our_file(name: str, directory: int) -> bool:
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    # With a second name it is a file from elsewhere that somebody linked here.
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1


def _take_place(name: str, ours: str, directory: int) -> None:
    """Give our file the name that somebody holds, and what he has there our file's.

    Both at once: between a removal and the next try, whoever loops would be the faster one.
    """
    for _ in range(_TRIES):
        try:
            _exchange(ours, name, directory)
        except FileNotFoundError:
            try:
                os.link(ours, name, src_dir_fd=directory, dst_dir_fd=directory)
            except FileExistsError:
                continue  # it comes and goes
            os.unlink(ours, dir_fd=directory)
            return
        metrics.PUT_ASIDE.inc()
        log.warning("put aside what stood in the place of a crash file", name=name, now=ours)
        return
    raise FileExistsError(errno.EEXIST, "it comes and goes again and again")


def _exchange(one: str, other: str, directory: int) -> None:
    """Exchange two names of a directory, renameat2(2); any kind of file can have them."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(directory, names[0], directory, names[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _own_directory(name: str, parent: int) -> int:
    """Open a directory that root owns, making it or taking it over."""
    for _ in range(_TRIES):
        directory = _directory(name, parent)
        if directory is None:
            continue
        try:
            _take_over(directory)
        except OSError:
            os.close(directory)
            raise
        # Until it was root's, its owner could move it away and put another in its place.
        if _same(os.fstat(directory), name, parent):
            return directory
        os.close(directory)
    raise OSError(None, "it is swapped again and again")


def _directory(name: str, parent: int) -> int | None:
    """Open a directory, made if it is missing; None: what was there is put aside, try again."""
    with suppress(FileExistsError):  # AppScope's library made it, or an attacker
        os.mkdir(name, 0o700, dir_fd=parent)
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):  # a file, or a link
            raise
    _put_aside(name, parent, "it is no directory")
    return None


def _take_over(directory: int) -> None:
    status = os.fstat(directory)
    if status.st_uid != os.geteuid():
        os.fchown(directory, os.geteuid(), os.getegid())
    if stat.S_IMODE(status.st_mode) != OPEN_TO_ALL:
        os.fchmod(directory, OPEN_TO_ALL)


def _same(status: os.stat_result, name: str, parent: int) -> bool:
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)


def _put_aside(name: str, parent: int, why: str) -> None:
    aside = _aside(name)
    try:
        os.rename(name, aside, src_dir_fd=parent, dst_dir_fd=parent)
    except FileNotFoundError:
        return  # whoever put it there took it away
    metrics.PUT_ASIDE.inc()
    log.warning("put aside what stood in the place of a directory", name=name, now=aside, why=why)


def _aside(name: str) -> str:
    return f".{name}.aside-{secrets.token_hex(4)}"


def _free_epoch(directory: int, epoch: int) -> int | None:
    not_ours: int | None = None
    for candidate in range(epoch, epoch + _EPOCHS_TRIED):
        owners = _owners_of(candidate, directory)
        if not owners:
            return candidate
        if not_ours is None and os.geteuid() not in owners:
            not_ours = candidate
    if not_ours is not None:
        _clear(not_ours, directory)
    return not_ours


def _owners_of(epoch: int, directory: int) -> set[int]:
    """Return the UIDs of all that have a name which a set of an epoch would have."""
    names = [layout.crash_file_name(kind, epoch) for kind in layout.Kind]
    names.append(f".{layout.crash_file_name(layout.Kind.CAPTURE, epoch)}")
    owners = set()
    for name in names:
        with suppress(FileNotFoundError):
            owners.add(os.stat(name, dir_fd=directory, follow_symlinks=False).st_uid)
    return owners


def _clear(epoch: int, directory: int) -> None:
    """Put aside what a capture record cannot replace; all else is, by `create_file` too."""
    name = layout.crash_file_name(layout.Kind.CAPTURE, epoch)
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            _put_aside(name, directory, "it is no capture record")


def _unusable(path: Path, error: OSError) -> SpoolUnusable:
    mend = f"make room on its disk, or let CRASHBUS_SPOOL name a directory on one: df {path.parent}"
    if error.errno == errno.EROFS:
        mend = (
            f"mount its disk for writing; under systemd, ReadWritePaths={path} for recorder and "
            "collector: docs/operations.md, 'The spool elsewhere'"
        )
    return SpoolUnusable(f"{path} cannot be used: {error.strerror or error}", mend)
