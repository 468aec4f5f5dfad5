"""How a service ends."""

import signal
import subprocess
import sys

import pytest

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

run("shipper", StuckSettings, work, lambda settings: "")
"""


def start(end: str) -> "subprocess.Popen[str]":
    """Start a service one of whose threads never comes back."""
    return subprocess.Popen(
        [sys.executable, "-c", _SERVICE.replace("{end}", end)], stderr=subprocess.PIPE, text=True
    )


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
    service = start("await asyncio.Event().wait()")
    try:
        assert service.stderr is not None
        while "ready" not in service.stderr.readline():
            assert service.poll() is None
        service.send_signal(signal.SIGTERM)
        service.communicate(timeout=WITHIN)
    finally:
        service.kill()

    assert service.returncode == 0
