"""The crash files of a process that lives, and goes on living."""

from dataclasses import dataclass, replace
from pathlib import Path

from crashbus.identity import boot_id, snapshot_id
from crashbus.layout import Kind, parse_crash_file_name
from crashbus.parts import Process
from services.common import redact
from services.common.bus_settings import BusSettings
from services.recorder import capturing, facts, finishing, pattern_file
from services.recorder.conditions import Conditions
from services.recorder.live import LiveHold
from services.recorder.recording import Recording
from services.recorder.settings import RecorderSettings


@dataclass(frozen=True)
class Snapshot:
    """What was taken.

    Attributes:
        held_for: seconds that the process stood still.
    """

    crash_id: str
    process: Process
    held_for: float
    directory: Path
    epoch: int

    def files(self) -> list[Path]:
        """Return the crash files that were made."""
        found = ((path, parse_crash_file_name(path.name)) for path in self.directory.iterdir())
        ours = (path for path, of in found if of and of[0] != Kind.CAPTURE and of[1] == self.epoch)
        return sorted(ours)


def take(pid: int, *, with_core: bool) -> Snapshot:
    """Hold a process, read it, let it go, and write its crash files where those of crashes are.

    Raises:
        CaptureFailed: it cannot be held, or has gone.
        SettingsError: a setting is wrong.
    """
    shared = BusSettings.load()
    redact.also(shared.redact_names, shared.redact_forms)
    # A process that lives shall not be held until the bus has its core.
    extent = {"core": "full" if with_core else "stacks", "core_to": "disk"}
    settings = RecorderSettings.load().model_copy(update=extent)
    configuration = {
        "recorder": settings.model_dump(mode="json"),
        "snapshot_of": pid,
        "core_pattern": pattern_file.current(),
    }
    on = Conditions.of(shared, settings, configuration)
    process = facts.read_identity(pid, boot_id())
    taken, held_for = _taken(process, on)
    finishing.finish(taken, on, settings.backtrace_deadline)
    directory = shared.spool / str(pid)
    return Snapshot(taken.record.crash_id, process, held_for, directory, taken.epoch)


def _taken(process: Process, on: Conditions) -> tuple[Recording, float]:
    """Return what was read of a process, and for how long it was held."""
    hold = LiveHold(process.pid)
    try:
        named = process.boot_id, process.pid, process.start_ticks
        name = snapshot_id(*named, hold.arrived_at)
        taken = capturing.capture_process(name, process, 0, hold, on)
    finally:
        hold.close()
    taken.notes += ["a snapshot of a living process, by crashbus snapshot", *hold.notes]
    assert taken.facts is not None
    taken.facts = replace(taken.facts, notes=(*taken.facts.notes, *hold.notes))
    return taken, hold.held_for or 0
