"""``crashbus snapshot``: the crash files of a process that lives, and goes on living."""

import os
from dataclasses import replace
from typing import Annotated

import typer

from crashbus.cli.errors import Trouble
from crashbus.cli.services import need
from crashbus.cli.terminal import console, plain
from crashbus.identity import boot_id, snapshot_id


def snapshot(
    number: Annotated[int, typer.Argument(metavar="PID", help="A process of this host.", min=1)],
    core: Annotated[
        bool, typer.Option("--core", help="With all of its memory: it is held for longer.")
    ] = False,
) -> None:
    """Take backtrace, snapshot, info and configuration of a living process.

    It is held for some milliseconds, and some of what it waits for ends with EINTR. The files go
    where those of crashes go.
    """
    if os.geteuid() != 0:
        raise Trouble("only root may look into any process", "run it with sudo")
    need("recorder")
    # Only here: nobody else needs what the recorder needs.
    from services.common import log, redact
    from services.common.bus_settings import BusSettings
    from services.recorder import capturing, conditions, facts, finishing, pattern_file
    from services.recorder.errors import CaptureFailed
    from services.recorder.live import LiveHold, process_of
    from services.recorder.settings import RecorderSettings

    log.configure("warning", "text", "snapshot")
    pid = process_of(number)
    if pid is None:
        raise Trouble(f"there is no process {number}", "ps -e shows those that there are")
    if pid == os.getpid():
        raise Trouble("that is this command itself", "name another process")
    if pid != number:
        console(stderr=True).print(f"crashbus: {number} is a thread: process {pid} is shown")
    shared = BusSettings.load()
    redact.also(shared.redact_names, shared.redact_forms)
    # A process that lives shall not be held until the bus has its core.
    extent = {"core": "full" if core else "stacks", "core_to": "disk"}
    settings = RecorderSettings.load().model_copy(update=extent)
    configuration = {
        "recorder": settings.model_dump(mode="json"),
        "snapshot_of": pid,
        "core_pattern": pattern_file.current(),
    }
    on = conditions.Conditions.of(shared, settings, configuration)
    try:
        process = facts.read_identity(pid, boot_id())
        hold = LiveHold(pid)
        try:
            named = process.boot_id, pid, process.start_ticks
            name = snapshot_id(*named, hold.arrived_at)
            taken = capturing.capture_process(name, process, 0, hold, on)
        finally:
            hold.close()
    except CaptureFailed as failure:
        raise Trouble(str(failure), failure.mend) from None
    taken.notes.append("a snapshot of a living process, by crashbus snapshot")
    taken.notes.extend(hold.notes)
    assert taken.facts is not None
    taken.facts = replace(taken.facts, notes=(*taken.facts.notes, *hold.notes))
    finishing.finish(taken, on, settings.backtrace_deadline)
    held = (hold.held_for or 0) * 1000
    console().print(
        plain(
            f"{process.comm}[{pid}] was held for {held:.0f} ms; crash {taken.record.crash_id}: "
            f"{shared.spool / str(pid)}, *_{taken.epoch}*\n"
            f"The collector delivers it: crashbus show {taken.record.crash_id}",
            lines=True,
        ),
        soft_wrap=True,
    )
