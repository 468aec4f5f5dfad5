"""How the kernel is made to send its crashes here, and who else is to get them."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import structlog

from services.common.crash_directory import SpoolUnusable
from services.common.health import Health
from services.recorder import core_pattern, pattern_file
from services.recorder.errors import RecorderError
from services.recorder.handover import mechanism
from services.recorder.handover.chain import CannotChain, Handler
from services.recorder.handover.mechanism import Mechanism, Plan
from services.recorder.kept import orphan_rules
from services.recorder.kept.orphans import Orphans
from services.recorder.settings import RecorderSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_GREETING = b"."  # to a pipe helper: only then it hands its crash over


class Takeover:
    """core_pattern, and what has to be there for it.

    Attributes:
        mechanism: how crashes come.
        former: the handler that gets each, too; None: nobody does.

    Raises:
        RecorderError: this kernel, or the settings, do not allow it.
    """

    def __init__(self, state: Path, settings: RecorderSettings) -> None:
        self._state = state
        self._settings = settings
        self.former = _former(state) if settings.chain else None
        version = mechanism.kernel_version(os.uname().release)
        self.mechanism = mechanism.choose(settings.mechanism, version, self.former is not None)

    @property
    def greeting(self) -> bytes:
        """What who connects to our socket is told first."""
        return _GREETING if self.mechanism is Mechanism.PIPE else b""

    def prepare(self, socket: Path, orphans: Orphans) -> Plan:
        """Lay down the pipe helper and its rules, and return what the kernel is to be told.

        Args:
            socket: where we listen.

        Raises:
            RecorderError: crashes could not come this way.
        """
        templates = self.former.templates if self.former is not None else ""
        helper = core_pattern.helper(self._state)
        plan = mechanism.plan(self.mechanism, socket, helper, templates)
        if plan.stand_in is None:
            _say_unkept(f"{helper} is too long for core_pattern: shorten CRASHBUS_STATE")
        elif not self._can_stand_in(plan, helper, orphans):
            return replace(plan, stand_in=None)
        return plan

    def install(self, plan: Plan) -> None:
        """Have the kernel send crashes here from now on."""
        core_pattern.install(self._state, plan, chains=self.former is not None)

    def _can_stand_in(self, plan: Plan, helper: Path, orphans: Orphans) -> bool:
        """Lay down the helper and its rules; tell whether it will do while no recorder is there.

        Raises:
            RecorderError: it will not do while one is there, either.
        """
        try:
            _install_helper(self._settings.helper, helper)
        except RecorderError as error:
            if plan.mechanism is Mechanism.PIPE:
                raise
            _say_unkept(str(error))
            return False
        return self._write_rules(helper, orphans)

    def _write_rules(self, helper: Path, orphans: Orphans) -> bool:
        """Leave rules for that time; False where that cannot be."""
        place = helper.with_name(orphan_rules.NAME)
        try:
            rules = orphan_rules.encoded(orphans.prepare(), self._settings, self.former)
            # Whole at any moment, for a helper takes what it finds, if nobody else may write it.
            new = place.with_suffix(".new")
            new.write_bytes(rules)
            new.chmod(0o600)
            new.replace(place)
        except (OSError, SpoolUnusable, RecorderError) as error:
            # As before there were any: such a crash is a visible gap.
            place.unlink(missing_ok=True)
            _say_unkept(str(error))
            return False
        return True


def _say_unkept(error: str) -> None:
    log.error("crashes while no recorder is there will not be kept", error=error)


def check(plan: Plan, health: Health) -> None:
    """See whether the kernel still sends crashes here."""
    found = pattern_file.current()
    if found == plan.pattern:
        health.working("core_pattern")
        return
    fault = f"somebody else has set it to {found!r}: crashes do not come here; restart to retake"
    if health.faults().get("core_pattern") != fault:
        log.error("core_pattern was changed", found=found)
    health.failing("core_pattern", fault)


def _former(state: Path) -> Handler | None:
    try:
        return Handler.parse(core_pattern.former(state))
    except CannotChain as error:
        log.warning("there is no handler to chain", because=str(error))
        return None


def kernel_can_start(program: Path) -> bool:
    """Tell whether core_pattern may name a program: it is there, and not mounted ``noexec``.

    The kernel looks for it in the first process's mount namespace. Where we may not look into that
    one, or a link there would lead us to a place of ours, path_resolution(7), our own has to do: a
    bind mount is ``noexec`` when what it shows is.
    """
    first, inside = Path("/proc/1/root"), program.relative_to("/")
    root = first if os.access(first, os.X_OK) and not _has_links(first, inside) else Path("/")
    return os.access(root / inside, os.X_OK)  # EACCES on noexec, access(2)


def _has_links(root: Path, inside: Path) -> bool:
    return any((root / place).is_symlink() for place in inside.parents if place.name)


def _install_helper(source: Path, place: Path) -> None:
    """Copy the helper to where only root can change what the kernel will run as root.

    Raises:
        RecorderError: it cannot be copied, or the kernel cannot start it there.
    """
    new = place.with_suffix(".new")
    try:
        shutil.copyfile(source, new)
        new.chmod(0o700)
        new.replace(place)
    except OSError as error:
        raise RecorderError(
            f"the pipe helper {source} cannot be installed as {place}: {error.strerror}; build it "
            "with make setup, or set CRASHBUS_RECORDER_HELPER"
        ) from error
    if not kernel_can_start(place):
        raise RecorderError(
            f"the kernel cannot start the pipe helper {place}: on the host its file system is "
            "mounted noexec, or nothing is there; let CRASHBUS_STATE name another directory, in a "
            "container by the host's own path"
        )
