"""core_pattern: taken over at the start, put back at the end, whatever happens between.

What was there before is on disk before it is changed, so that a recorder that was killed
neither forgets it nor takes its own pattern for somebody else's::

    python -m services.recorder.core_pattern --restore
"""

import argparse
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from services.common.bus_settings import BusSettings
from services.common.settings import SettingsError
from services.recorder import hardening, pattern_file
from services.recorder.errors import RecorderError
from services.recorder.handover import mechanism
from services.recorder.handover.mechanism import Plan
from services.recorder.pattern_file import (
    LOCK,
    LOCK_WITHIN,
    PATTERN,
    PIPE_LIMIT,
    current,
    locked,
    write,
)

log: structlog.stdlib.BoundLogger = structlog.get_logger()

KERNEL_DEFAULT = "core"
_NAME = "core_pattern.json"  # of the file that says what was before, beside the pipe helper


@dataclass(frozen=True)
class Saved:
    """What was in force before us, and what we put in its place.

    Attributes:
        ours: while a recorder runs.
        stand_in: while none does, see `Plan`.
    """

    pattern: str
    pipe_limit: int
    ours: str
    stand_in: str | None

    def has(self, found: str) -> bool:
        """Tell whether a pattern is one of ours."""
        return found in (self.ours, self.stand_in)


def directory(state: Path) -> Path:
    """Return the recorder's own directory in the state directory, made if it is missing.

    Raises:
        RecorderError: it cannot be made, or is not ours alone.
    """
    path = state / "recorder"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RecorderError(
            f"{path} cannot be made: {error.strerror}; let CRASHBUS_STATE name another directory"
        ) from error
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 or not stat.S_ISDIR(status.st_mode):
        # The pipe helper lies here, and the kernel runs it as root.
        raise RecorderError(
            f"others may write to {path}: remove it, or let CRASHBUS_STATE name another directory"
        )
    return path


class AnotherRuns(RecorderError):
    """A recorder runs on this host already."""


@contextmanager
def only_one(within: float = LOCK_WITHIN) -> Iterator[None]:
    """Hold the right to change core_pattern.

    Args:
        within: seconds to wait for it.

    Raises:
        AnotherRuns: another process holds it.
        RecorderError: it cannot be had at all.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(within))
        except BlockingIOError:
            raise AnotherRuns(
                f"a recorder runs on this host already, it holds {LOCK}: stop it first"
            ) from None
        except OSError as error:
            raise RecorderError(f"{LOCK} cannot be made: {error.strerror}; run as root") from error
        yield


def former(state: Path) -> str:
    """Return the core_pattern of before the recorder; changes nothing.

    Raises:
        OSError: it may not be read.
    """
    found = current()
    saved = _left_behind(state, found)
    if saved is not None:
        return saved.pattern
    return KERNEL_DEFAULT if mechanism.helper_of(found) else found


def install(state: Path, plan: Plan, chains: bool = False) -> None:
    """Take over core_pattern.

    Args:
        chains: who had it before still gets its share.

    Raises:
        RecorderError: the kernel refuses.
    """
    previous = _previous(state, plan)
    _save(_file(state), Saved(previous.pattern, previous.pipe_limit, plan.pattern, plan.stand_in))
    if previous.pattern.startswith(("|", "@")) and not chains:
        log.warning(
            "taking over from another handler, which gets nothing until the recorder stops",
            handler=mechanism.owner(previous.pattern),
        )
    try:
        write(PIPE_LIMIT, str(mechanism.PIPE_LIMIT))
        write(PATTERN, plan.pattern)
    except OSError as error:
        raise RecorderError(
            f"cannot make core_pattern {plan.pattern!r}: {error.strerror}; the recorder must run "
            "as root, in a container with a writable /proc/sys/kernel/core_pattern and with "
            "CRASHBUS_RECORDER_MECHANISM=pipe"
        ) from error
    log.info("core_pattern changed", old=previous.pattern, new=plan.pattern)


def restore(state: Path) -> str | None:
    """Put back what was there before; return it, or None when there was nothing to put back.

    A pattern that somebody else has set meanwhile stays.
    """
    saved = _load(_file(state))
    if saved is None:
        return None
    found = current()
    was_ours = saved.has(found)
    if was_ours:
        # The pattern last: as long as it is ours, this can be done again.
        write(PIPE_LIMIT, str(saved.pipe_limit))
        pattern = KERNEL_DEFAULT if _is_dead_socket(saved.pattern) else saved.pattern
        write(PATTERN, pattern)
        log.info("core_pattern put back", old=found, new=pattern)
    else:
        log.warning("core_pattern was changed by somebody else and stays", found=found)
    _file(state).unlink(missing_ok=True)
    return saved.pattern if was_ours else None


def keeps_crashes(state: Path) -> bool:
    """Tell whether core_pattern names our pipe helper, which keeps crashes without a recorder."""
    saved = _load(_file(state))
    return saved is not None and current() == saved.stand_in


def leave_to_helper(state: Path) -> bool:
    """Have our pipe helper keep crashes until there is a recorder again; False if it cannot."""
    saved = _load(_file(state))
    return saved is not None and pattern_file.leave_to_helper(saved.ours, saved.stand_in)


def helper(state: Path) -> Path:
    """Return where the pipe helper lies for the kernel.

    Raises:
        RecorderError: as `directory`.
    """
    # Not /run: that is mounted noexec on many hosts.
    return directory(state).resolve() / mechanism.HELPER


def remove_helper(state: Path) -> None:
    """Remove the pipe helper, unless the kernel still starts it.

    Its rules stay, for those that wait, and will see that no recorder takes their crash.
    """
    place = helper(state)
    if not current().startswith(f"|{place} "):
        place.unlink(missing_ok=True)


def _previous(state: Path, plan: Plan) -> Saved:
    """Tell what to go back to: what is in force, unless that is a killed recorder's."""
    found = current()
    saved = _left_behind(state, found)
    if saved is not None:
        log.info("the last recorder did not put core_pattern back", previous=saved.pattern)
        return saved
    if mechanism.helper_of(found) or found == plan.pattern:
        log.warning(
            "core_pattern is a recorder's and nothing says what was before it; the kernel's "
            "default will be put back",
            default=KERNEL_DEFAULT,
        )
        return Saved(KERNEL_DEFAULT, 0, found, None)
    return Saved(found, int(PIPE_LIMIT.read_text()), plan.pattern, plan.stand_in)


def _left_behind(state: Path, found: str) -> Saved | None:
    """Return what a recorder whose pattern is in force has saved, here or in the state directory
    that its helper lies in; None where that is not known, or it is no recorder's.
    """
    theirs = mechanism.helper_of(found)
    for path in (_path(state), *([theirs.with_name(_NAME)] if theirs else [])):
        saved = _load(path)
        if saved is not None and saved.has(found):
            return saved
    return None


def _is_dead_socket(pattern: str) -> bool:
    """Tell whether a pattern names a coredump socket that nobody listens on: cores sent there
    are lost.
    """
    if not pattern.startswith("@"):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(pattern.lstrip("@"))
        except OSError:
            log.warning("nobody listens where cores went before", pattern=pattern)
            return True
    return False


def _file(state: Path) -> Path:
    return _path(directory(state).parent)


def _path(state: Path) -> Path:
    return state / "recorder" / _NAME


def _load(path: Path) -> Saved | None:
    try:
        raw = json.loads(path.read_bytes())
        ours = str(raw["ours"])
        # Older versions wrote none, and left crashes to a pipe helper only where it was theirs.
        stand_in = raw.get("stand_in", ours if ours.startswith("|") else None)
        return Saved(str(raw["pattern"]), int(raw["pipe_limit"]), ours, stand_in)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.error("cannot be read, ignoring it", file=str(path), error=repr(error))
        return None


def _save(path: Path, saved: Saved) -> None:
    """Write durably: after a power cut there is either the old file or the new one."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(json.dumps(asdict(saved)).encode())
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _is_started_again() -> bool:
    """Tell whether we clean up for systemd, after a recorder that it starts again.

    ExecStopPost= learns by SERVICE_RESULT and EXIT_STATUS how it ended, systemd.exec(5). Those that
    are not: one that was stopped, in order or killed after TimeoutStopSec=, and one that found a
    setting or the host wrong, RestartPreventExitStatus= of the unit.
    """
    result = os.environ.get("SERVICE_RESULT", "success")
    return result not in ("success", "timeout") and os.environ.get("EXIT_STATUS") != "2"


def main() -> None:
    """Put core_pattern back after a recorder that was killed."""
    hardening.never_dump_core()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--restore", action="store_true", required=True, help="do so")
    parser.add_argument("--state", type=Path, help="state directory (default: CRASHBUS_STATE)")
    arguments = parser.parse_args()
    try:
        state = arguments.state or BusSettings.load().state
        with only_one():
            if _is_started_again() and leave_to_helper(state):
                sys.stdout.write("the pipe helper keeps crashes\n")
                return
            restored = restore(state)
            remove_helper(state)
    except (SettingsError, OSError) as error:
        sys.exit(f"crashbus recorder: {error}")
    sys.stdout.write(f"core_pattern: {current()}\n" if restored else "nothing to put back\n")


if __name__ == "__main__":
    main()
