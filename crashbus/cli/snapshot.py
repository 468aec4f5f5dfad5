"""``crashbus snapshot``: the crash files of a process that lives, and goes on living."""

import os
from typing import Annotated

import typer

from crashbus.cli.errors import Trouble
from crashbus.cli.services import need
from crashbus.cli.terminal import console, plain, print_json


def snapshot(
    number: Annotated[int, typer.Argument(metavar="PID", help="A process of this host.", min=1)],
    core: Annotated[
        bool, typer.Option("--core", help="With all of its memory: it is held for longer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Take backtrace, snapshot, info and configuration of a living process.

    It is held for some milliseconds, and some of what it waits for ends with EINTR. The files go
    where those of crashes go.
    """
    if os.geteuid() != 0:
        raise Trouble("only root may look into any process", "run it with sudo")
    need("recorder")
    # Only here: nobody else needs what the recorder needs.
    from services.common import log
    from services.recorder.errors import CaptureFailed
    from services.recorder.snapshot import take

    log.configure("warning", "text", "snapshot")
    pid = _process_meant(number)
    try:
        taken = take(pid, with_core=core)
    except CaptureFailed as failure:
        raise Trouble(str(failure), failure.mend) from None
    if as_json:
        files = [str(path) for path in taken.files()]
        told = {"crash_id": taken.crash_id, "process": taken.process, "held_for": taken.held_for}
        print_json({**told, "files": files})
        return
    console().print(
        plain(
            f"{taken.process.comm}[{pid}] was held for {taken.held_for * 1000:.0f} ms; crash "
            f"{taken.crash_id}: {taken.directory}, *_{taken.epoch}*\n"
            f"The collector delivers it: crashbus show {taken.crash_id}",
            lines=True,
        ),
        soft_wrap=True,
    )


def _process_meant(number: int) -> int:
    """Return the PID that a number names, which may be one of the process's threads."""
    from services.recorder.live import process_of

    pid = process_of(number)
    if pid is None:
        raise Trouble(f"there is no process {number}", "ps -e shows those that there are")
    if pid == os.getpid():
        raise Trouble("that is this command itself", "name another process")
    if pid != number:
        console(stderr=True).print(f"crashbus: {number} is a thread: process {pid} is shown")
    return pid
