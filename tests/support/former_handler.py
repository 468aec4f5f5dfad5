#!/usr/bin/python3 -I
"""A handler that core_pattern names: keeps what it was given, or misbehaves; see `former`.

    former_handler.py <how> <pid> …

Only for processes that it is told to: any other of the host may crash at the same time.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

HOW, PID = sys.argv[1:3]
PLACE = Path(sys.argv[0]).resolve().parent / PID
NAMESPACES = Path("/proc/self/ns")
PRIVILEGES = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapBnd", "NoNewPrivs", "Seccomp")


def tell(what: object) -> None:
    """All at once, so that whoever finds the file finds it whole."""
    (PLACE / "new").write_text(json.dumps(what))
    (PLACE / "new").rename(PLACE / "kept")


def status(pid: str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def keep() -> None:
    """Every way to tell what a handler got, and how it was started."""
    mine, crashed = status("self"), status(PID)
    found = {
        "arguments": sys.argv,
        "environment": dict(os.environ),
        "cwd": str(Path.cwd()),
        "descriptors": [one for one in range(64) if Path(f"/proc/self/fd/{one}").exists()],
        "limit": resource.getrlimit(resource.RLIMIT_CORE),
        "namespaces": {one.name: str(one.readlink()) for one in NAMESPACES.iterdir()},
        "privileges": {name: mine[name] for name in PRIVILEGES},
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "executable": str(Path(f"/proc/{PID}/exe").readlink()),
        "dumping": crashed["CoreDumping"],
    }
    with (PLACE / "core").open("wb") as core:
        shutil.copyfileobj(sys.stdin.buffer, core)
    tell(found)


def main() -> None:
    match HOW:
        case "keeps":
            keep()
        case "hangs":
            if os.fork():
                tell("hanging")
            time.sleep(3600)
        case "stops":
            os.kill(os.getppid(), signal.SIGSTOP)
            time.sleep(3600)
        case "forks":
            if not os.fork():
                tell(os.getpid())
                signal.pause()
        case "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "fails":
            sys.exit(3)
        case "ends":
            pass


if __name__ == "__main__" and PLACE.exists():
    main()
