"""A container's health check tells what the service itself says."""

import os
import subprocess
import sys

import pytest

from services.common.health import Health, serve
from services.common.probe import address
from tests.support.nats import free_port


def probe(port: int) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"CRASHBUS_SHIPPER_HTTP": f"0.0.0.0:{port}"}
    command = [sys.executable, "-m", "services.common.probe"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_probe_fails_with_the_reason_and_passes_without() -> None:
    health, port = Health(), free_port()
    stop = serve(health, f"127.0.0.1:{port}")
    try:
        assert probe(port).returncode == 0
        health.failing("bus", "no server answers")
        found = probe(port)
    finally:
        stop()

    assert found.returncode == 1
    assert "no server answers" in found.stderr


def test_probe_fails_where_nobody_listens() -> None:
    assert probe(free_port()).returncode == 1


def test_address_is_that_of_the_one_service() -> None:
    assert address({"CRASHBUS_RECORDER_HTTP": "127.0.0.1:9602"}) == "127.0.0.1:9602"
    with pytest.raises(ValueError, match="HTTP"):
        address({"CRASHBUS_HOST": "web1"})
