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
            try:
                await asyncio.to_thread(_remove, root, crash)
            except OSError as error:
                log.warning("files stay", crash_id=crash.crash_id, error=str(error))
                continue
            ledger.forget(crash)
            log.info("removed", crash_id=crash.crash_id, files=len(crash.sources))
        await asyncio.sleep(SWEEP_EVERY)


def _remove(root: str, crash: Crash) -> None:
    with spool.open_directory(root) as parent:
        for name in {source.directory for source in crash.sources.values()}:
            try:
                with spool.open_directory(name, parent) as directory:
                    _remove_files(directory, name, crash)
                os.rmdir(name, dir_fd=parent)
            except FileNotFoundError:
                continue  # somebody was faster
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # files of another crash may be in it
                    raise


def _remove_files(directory: int, name: str, crash: Crash) -> None:
    for source in crash.sources.values():
        if source.directory != name:
            continue
        parsed = layout.parse_crash_file_name(source.name)
        assert parsed is not None
        for file in (source.name, layout.crash_file_name(Kind.CAPTURE, parsed[1])):
            try:
                os.unlink(file, dir_fd=directory)
            except FileNotFoundError:
                continue
