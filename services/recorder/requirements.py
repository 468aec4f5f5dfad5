"""What the recorder needs of this host, for ``crashbus doctor``."""

import importlib.util
import os
import shutil
import stat
from pathlib import Path

from services.common.bus_settings import BusSettings
from services.common.finding import Finding
from services.recorder import core_pattern, pattern_file
from services.recorder.errors import RecorderError
from services.recorder.handover import mechanism
from services.recorder.handover.chain import CannotChain, Handler
from services.recorder.handover.listener import BACKLOG
from services.recorder.handover.mechanism import Mechanism
from services.recorder.settings import RecorderSettings

_SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
_ENOUGH_ROOM = 1024**3  # bytes; a core of a common service fits


def check() -> list[Finding]:
    """Look at everything the recorder needs; changes nothing.

    Raises:
        SettingsError: a setting is wrong.
    """
    shared, settings = BusSettings.load(), RecorderSettings.load()
    return [
        _root(),
        *_cores(shared.state, settings),
        _core_pattern(),
        _backlog(),
        _suid_dumpable(),
        _drgn(),
        _spool(shared.spool),
        _room(shared.spool),
    ]


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding("recorder: root", True, "runs as root")
    return Finding("recorder: root", False, "does not run as root", "run it as root")


def _cores(state: Path, settings: RecorderSettings) -> list[Finding]:
    """Say how cores come, and who had them before."""
    handler, fault = None, ""
    try:
        handler = Handler.parse(core_pattern.former(state))
    except CannotChain as error:
        fault = str(error)
    except OSError as error:
        fault = f"it cannot be told who had the cores before: {error.strerror}"
    return [
        _mechanism(settings, settings.chain and handler is not None),
        _former(settings, handler, fault),
    ]


def _former(settings: RecorderSettings, handler: Handler | None, fault: str) -> Finding:
    name = "recorder: former handler"
    if handler is None:
        switch_off = "set CRASHBUS_RECORDER_CHAIN=false" if settings.chain else ""
        return Finding(name, not settings.chain, fault, switch_off)
    if not settings.chain:
        return Finding(
            name,
            True,
            f"{handler.program} gets no cores while the recorder runs; with "
            "CRASHBUS_RECORDER_CHAIN=true it gets each, too: every process is then held until it "
            f"is done, {settings.chain_deadline:g} s at most, and cores come by the pipe helper",
        )
    detail = (
        f"{handler.program} is started for each crash once it is captured; the process is held "
        f"meanwhile, {settings.chain_deadline:g} s at most"
    )
    if not os.access(handler.program, os.X_OK) and not pattern_file.in_container():
        mend = f"install {handler.program}, or set CRASHBUS_RECORDER_CHAIN=false"
        return Finding(name, False, f"{detail}; but it is not there", mend)
    return Finding(name, True, detail)


def _mechanism(settings: RecorderSettings, chains: bool) -> Finding:
    name, release = "recorder: mechanism", os.uname().release
    try:
        chosen = mechanism.choose(settings.mechanism, mechanism.kernel_version(release), chains)
    except RecorderError as error:
        return Finding(name, False, str(error), "set CRASHBUS_RECORDER_MECHANISM=auto")
    detail = f"Linux {release}: {chosen.value}"
    is_pipe = chosen is Mechanism.PIPE
    if not os.access(settings.helper, os.R_OK):
        detail = f"{detail}, but {settings.helper} is missing"
        lost = "" if is_pipe else ": crashes are lost while the recorder is down"
        return Finding(name, not is_pipe, f"{detail}{lost}", "make setup")
    stand_in = "" if is_pipe else "; while the recorder is down, a pipe helper keeps crashes for it"
    return Finding(name, True, f"{detail}{stand_in}")


def _core_pattern() -> Finding:
    name = "recorder: core_pattern"
    try:
        found = pattern_file.current()
    except OSError as error:
        return Finding(name, False, f"cannot be read: {error.strerror}", "mount /proc")
    writable = os.access(pattern_file.PATTERN, os.W_OK)
    detail = f"{found!r}: cores go to {mechanism.owner(found)}"
    if not writable:
        return Finding(name, False, f"{detail}; cannot be changed", "mount /proc/sys writable")
    return Finding(name, True, f"{detail}; the recorder takes over while it runs")


def _backlog() -> Finding:
    """Say how many crashes may wait at once: listen(2)."""
    name, allowed = "recorder: backlog", int(_SOMAXCONN.read_text())
    if allowed >= BACKLOG:
        return Finding(name, True, f"{BACKLOG} crashes may wait at once")
    return Finding(
        name,
        False,
        f"net.core.somaxconn={allowed}: so many crashes may wait at once; with the coredump "
        "socket, more are lost",
        f"sysctl net.core.somaxconn={BACKLOG} where the recorder runs, and start it again",
    )


def _suid_dumpable() -> Finding:
    value = Path("/proc/sys/fs/suid_dumpable").read_text().strip()
    words = {
        "0": "the kernel dumps no setuid or otherwise privileged programs",
        "1": "the kernel dumps setuid programs too, readable by their users: insecure",
        "2": "the kernel dumps setuid programs too, for root only",
    }
    detail = f"fs.suid_dumpable={value}: {words.get(value, 'unknown')}"
    mend = "sysctl fs.suid_dumpable=2, to capture these programs too" if value == "0" else ""
    # Not capturing them is a choice of the host's owner, no fault.
    return Finding("recorder: setuid programs", True, detail, mend)


def _drgn() -> Finding:
    if importlib.util.find_spec("drgn") is None:
        return Finding(
            "recorder: drgn",
            False,
            "not installed: backtraces will be missing",
            "pip install 'crashbus[recorder]'",
        )
    return Finding("recorder: drgn", True, "installed")


def _spool(path: Path) -> Finding:
    name = "recorder: spool"
    try:
        status = path.lstat()
    except FileNotFoundError:
        return Finding(name, True, f"{path} is not there yet; the recorder makes it")
    except OSError as error:
        return Finding(name, False, f"{path}: {error.strerror}", "let CRASHBUS_SPOOL name another")
    if not stat.S_ISDIR(status.st_mode):
        return Finding(name, False, f"{path} is no directory", f"rm {path}")
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != 0 or mode != 0o1777:
        return Finding(
            name,
            True,
            f"{path} belongs to UID {status.st_uid}, mode {mode:o}; the recorder takes it over",
        )
    return Finding(name, True, f"{path} belongs to root and is open to all")


def _room(path: Path) -> Finding:
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    detail = f"{free / 1024**3:.1f} GiB free for cores in {place}"
    if free < _ENOUGH_ROOM:
        return Finding("recorder: room", False, detail, f"free some: df {place}")
    return Finding("recorder: room", True, detail)
