"""What reaches the terminal.

Process names, arguments, paths, backtraces and errors were written by whoever crashed, so
all text goes through `plain` before it is shown. Consoles interpret no markup; colour is
given by ``rich.text.Text`` alone.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from crashbus import names

_PIPE_WIDTH = 4096  # columns: a program that reads a table wants whole cells


def plain(text: str, *, lines: bool = False) -> str:
    """Return text that a terminal shows and does not obey; see `crashbus.names.printable`.

    Args:
        lines: keep line feeds and tabs, as in a backtrace.
    """
    return names.printable(text, keep="\n\t" if lines else "")


def console(*, stderr: bool = False) -> Console:
    """Return a console for standard output or standard error as they are now."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr,
        markup=False,
        emoji=False,
        highlight=False,
        width=None if stream.isatty() else _PIPE_WIDTH,
    )


def table(*columns: str) -> Table:
    """Return an empty table with these headings, made to be read by people and by awk."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        made.add_column(name, no_wrap=True)
    return made


def print_json(value: Any) -> None:
    """Print a value as one line of JSON in ASCII, so that no byte of it is obeyed."""
    sys.stdout.write(json.dumps(_jsonable(value)) + "\n")
    sys.stdout.flush()


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _jsonable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(one) for one in value]
    return value


def size(count: int) -> str:
    """Return a number of bytes for people, such as ``9.8 MiB``."""
    amount, units = float(count), iter(("KiB", "MiB", "GiB", "TiB"))
    if count < 1024:
        return f"{count} B"
    unit = ""
    while amount >= 1024 and (bigger := next(units, None)):
        amount, unit = amount / 1024, bigger
    return f"{amount:.1f} {unit}"


def moment(time: float) -> str:
    """Return a Unix time in UTC, as the folders at a destination are named."""
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}Z"


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(f"crashbus: {record.getMessage()}")


def show_warnings() -> None:
    """Show what the bus client warns of on standard error, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    logger = logging.getLogger("crashbus")
    logger.handlers, logger.propagate = [handler], False
    logging.getLogger("nats").setLevel(logging.CRITICAL)  # the bus says it once, in words
