"""Retention: removes crash files from this host once every destination has confirmed them."""

import asyncio
import errno
import os

import structlog

from crashbus import layout
from crashbus.layout import Kind
from services.collector import spool
from services.collector.ledger import Crash, Ledger

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SWEEP_EVERY = 5.0  # seconds


async def run(root: str, ledger: Ledger, keep: float) -> None:
    """Remove what has been kept for `keep` seconds after its delivery, until cancelled."""
    while True:
        for crash in ledger.expired(keep):
            await _remove_crash(root, ledger, crash)
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
        parsed = layout.parse_crash_file_name(name)
        assert parsed is not None
        for file in (name, layout.crash_file_name(Kind.CAPTURE, parsed[1])):
            try:
                os.unlink(file, dir_fd=directory)
            except FileNotFoundError:
                continue
