"""Retention: removes crash files from this host once every destination has confirmed them."""

import asyncio
import errno
import os
import time
from contextlib import suppress

import structlog

from crashbus import layout
from crashbus.layout import Kind
from services.collector import spool
from services.collector.ledger import Crash, Ledger

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SWEEP_EVERY = 5.0  # seconds
STRAY_AFTER = 86400.0  # seconds; a crash that is being captured has none so old


async def run(root: str, ledger: Ledger, keep: float) -> None:
    """Remove what has been kept for `keep` seconds after its delivery, until cancelled."""
    while True:
        for crash in ledger.expired(keep):
            await _remove_crash(root, ledger, crash)
        try:
            await asyncio.to_thread(_remove_strays, root, ledger)
        except OSError as error:
            log.warning("binaries of no crash stay", error=str(error))
        await asyncio.sleep(SWEEP_EVERY)


async def _remove_crash(root: str, ledger: Ledger, crash: Crash) -> None:
    # A further set may have been entered since the sweep began, or while files are removed.
    if crash.delivered_at is None:
        return
    files = [(source.directory, source.name) for source in crash.sources.values()]
    try:
        await asyncio.to_thread(_remove, root, files)
    except OSError as error:
        log.warning("files stay", crash_id=crash.crash_id, error=str(error))
        return
    if crash.delivered_at is not None and len(crash.sources) == len(files):
        ledger.forget(crash)
        log.info("removed", crash_id=crash.crash_id, files=len(files))


def _remove_strays(root: str, ledger: Ledger) -> None:
    """Remove binaries that belong to no crash: their recorder was killed, or their record."""
    with (
        suppress(FileNotFoundError),
        spool.open_directory(root) as parent,
        spool.open_directory(layout.BINARIES, parent) as directory,
        os.scandir(directory) as entries,
    ):
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            is_old = time.time() - status.st_mtime > STRAY_AFTER
            if status.st_uid == 0 and is_old and not ledger.knows_file(layout.BINARIES, entry.name):
                os.unlink(entry.name, dir_fd=directory)
                log.info("removed a binary of no crash", name=entry.name)


def _remove(root: str, files: list[tuple[str, str]]) -> None:
    with spool.open_directory(root) as parent:
        for name in {directory for directory, _ in files}:
            try:
                with spool.open_directory(name, parent) as directory:
                    _remove_files(directory, [file for place, file in files if place == name])
                os.rmdir(name, dir_fd=parent)
            except FileNotFoundError:
                continue  # somebody was faster
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # files of another crash may be in it
                    raise


def _remove_files(directory: int, names: list[str]) -> None:
    for name in names:
        parsed = layout.parse_crash_file_name(name)  # None for a binary
        record = [layout.crash_file_name(Kind.CAPTURE, parsed[1])] if parsed else []
        for file in (name, *record):
            try:
                os.unlink(file, dir_fd=directory)
            except FileNotFoundError:
                continue
