"""The command ``crashbus``.

What stands in this module runs without the ``cli`` extra, so that an image which holds one
service needs nothing more to run ``crashbus <service>``.
"""

import io
import sys

from crashbus import own_cores
from crashbus.cli.services import SERVICES, become


def main() -> None:
    """Run the command line and exit."""
    # Keys may be in our environment; a crash until now leaves a core, which has it.
    own_cores.leave_none("crashbus")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no error
    arguments = sys.argv[1:]
    if arguments and arguments[0] in SERVICES:
        become(arguments[0], arguments[1:])
    try:
        from crashbus.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("crashbus", "services"):
            raise
        sys.stderr.write(
            f"crashbus: the command line needs {error.name}, which is not installed; "
            "pip install 'crashbus[cli]'\n"
        )
        sys.exit(2)
    app(prog_name="crashbus")
