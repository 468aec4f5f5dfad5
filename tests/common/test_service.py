"""What a service says of itself, and how it ends."""

import signal
import subprocess
import sys
import urllib.request
from importlib.metadata import version

import pytest

from tests.support.nats import free_port

WITHIN = 10  # seconds; what stop grants, though it takes less

_SERVICE = """
import asyncio, pathlib, sys, threading
from typing import ClassVar
from services.common.service import run
from services.common.settings import Settings, SettingsError

class StuckSettings(Settings):
    SECTION: ClassVar[str] = "stuck"

async def work(runtime, settings):
    stuck = asyncio.create_task(asyncio.to_thread(threading.Event().wait))
    await asyncio.sleep(0)
    runtime.ready()
    {end}

run("shipper", StuckSettings, work, lambda settings: "{http}")
"""


def start(end: str, http: str = "") -> "subprocess.Popen[str]":
    """Start a service one of whose threads never comes back."""
    program = _SERVICE.replace("{end}", end).replace("{http}", http)
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("end", "status"),
    [("raise RuntimeError('out of luck')", 1), ("raise SettingsError('out of luck')", 2)],
)
def test_failed_service_leaves_though_a_thread_is_stuck(end: str, status: int) -> None:
    service = start(end)
    try:
        _, log = service.communicate(timeout=WITHIN)
    finally:
        service.kill()

    assert service.returncode == status
    assert "out of luck" in log


def test_stopped_service_leaves_though_a_thread_is_stuck() -> None:
    http = f"127.0.0.1:{free_port()}"
    service = start("await asyncio.Event().wait()", http)
    log = ""
    try:
        assert service.stderr is not None
        while "ready" not in log:
            log += service.stderr.readline()
            assert service.poll() is None
        with urllib.request.urlopen(f"http://{http}/metrics", timeout=WITHIN) as answer:
            metrics = answer.read().decode()
        service.send_signal(signal.SIGTERM)
        service.communicate(timeout=WITHIN)
    finally:
        service.kill()

    assert service.returncode == 0
    assert f"version={version('crashbus')}" in log
    assert f'version="{version("crashbus")}"' in metrics
