"""Keeping a service that moves large blocks small."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
# By default there are eight for each processor. Threads hardly meet in one: Python's small objects
# lie elsewhere, and large blocks in none.
_ARENAS = 2
# Bytes; parts are larger. Chunks, and the block in which a frame is made, are a little smaller: to
# have a fresh one for each costs the kernel a page fault for every 4 KiB.
LARGE = 2 * 1024 * 1024


def keep_little() -> None:
    """Have freed memory given back to the kernel, rather than kept for later, mallopt(3).

    By default glibc learns to keep them, in one arena for each thread, where small objects then
    pin them: four uploads at a time took 190 MiB instead of 100. Of what is smaller, each arena
    keeps as much as one large block, and more between small ones: with 16 arenas a recorder kept 35
    MiB of a storm of 200 crashes, with 2 it is 10. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)
        mallopt(_M_TRIM_THRESHOLD, LARGE)
        mallopt(_M_ARENA_MAX, _ARENAS)
