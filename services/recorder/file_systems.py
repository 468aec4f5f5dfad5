"""Whether a read of a file ends, by the file system that it lies on; statfs(2)."""

import ctypes
import os

# File systems of which a read ends: with FUSE or over a network another process decides that.
# include/uapi/linux/magic.h; statfs(2).
_LOCAL = {
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # XFS
    0x9123683E,  # Btrfs
    0x794C7630,  # overlayfs
    0x01021994,  # tmpfs
    0x2FC12FC1,  # ZFS
    0xF2F52010,  # F2FS
    0x73717368,  # SquashFS
    0xE0F5E1E2,  # EROFS
    0xCA451A4E,  # bcachefs
}

_LIBC = ctypes.CDLL(None, use_errno=True)


def is_local(file: int) -> bool:
    """Tell whether reading an open file takes nobody else's answer.

    To ask is to wait for a file system that does not answer, too. An overlay is local by its own
    word, whatever it lies over.
    """
    try:
        return _file_system(file) in _LOCAL
    except OSError:
        return False


def _file_system(file: int) -> int:
    """Return what kind of file system a file lies on: f_type of statfs(2)."""
    # struct statfs begins with f_type, a long; it is smaller than this in every ABI.
    buffer = (ctypes.c_long * 64)()
    if _LIBC.fstatfs(file, buffer):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(buffer[0]) & 0xFFFFFFFF
