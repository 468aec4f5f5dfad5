"""What the container engine of this host can do, and which compose files it needs for that."""

import http.client
import json
import os
import re
import socket
from pathlib import Path

from services.common.finding import Finding

SOCKETS = (Path("/run/docker.sock"), Path("/run/podman/podman.sock"))
ANSWER_WITHIN = 3.0  # seconds; a person is waiting
_MAX_ANSWER = 1024 * 1024  # bytes
# Docker 20.10 refuses CAP_BPF and CAP_PERFMON as unknown where it was built without them, as in
# Debian 12; the kernel has them since 5.8, and CAP_CHECKPOINT_RESTORE since 5.9 (capabilities(7)).
# All are parts of CAP_SYS_ADMIN.
_LEAST_ENGINE = 23
_LEAST_KERNEL = (5, 9)


def findings() -> list[Finding]:
    """Return what is to be said of the engine, if there is one."""
    for path in SOCKETS:
        if path.is_socket():
            try:
                name, version = _ask(path)
            except (OSError, ValueError, http.client.HTTPException) as error:
                mend = f"run as a user who may use {path}"
                return [Finding("container engine", False, f"{path}: {error}", mend)]
            return [Finding("container engine", True, advice(name, version, os.uname().release))]
    return []


def advice(name: str, version: str, kernel: str) -> str:
    """Return how to start Crashbus with this engine on this kernel."""
    engine = int(found[0]) if (found := re.findall(r"\d+", version)) else 0
    release = tuple(int(part) for part in re.findall(r"\d+", kernel)[:2])
    files, why = "-f compose.yaml", ""
    if release < _LEAST_KERNEL:
        why = f" (Linux {kernel} lacks a capability that is asked for)"
    elif name == "Docker" and engine < _LEAST_ENGINE:
        why = " (this version may not know CAP_BPF)"
    if why:
        files += " -f compose.sysadmin.yaml"
    return f"{name} {version}; in deploy/: docker compose {files} up -d{why}"


def _ask(path: Path) -> tuple[str, str]:
    """Return the engine's name and version.

    Raises:
        OSError, ValueError, http.client.HTTPException: it did not say.
    """
    connection = http.client.HTTPConnection("localhost", timeout=ANSWER_WITHIN)
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(ANSWER_WITHIN)
        connection.sock.connect(str(path))
        connection.request("GET", "/version")
        answer = json.loads(connection.getresponse().read(_MAX_ANSWER))
        parts = [one.get("Name", "") for one in answer.get("Components", [])]
        name = "Podman" if any("Podman" in part for part in parts) else "Docker"
        return name, str(answer["Version"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"an odd answer: {error!r}") from error
    finally:
        connection.close()
