"""The systemd units: valid, confined, and their files exist."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.requirements import need_program
from tests.support.units import UNITS, values

PYTHON = "/opt/crashbus/bin/python"
NAMES = sorted(path.name for path in UNITS.glob("*.service"))
# What `systemd-analyze security` may say of a unit, of 10: a rise is a loss of confinement.
EXPOSURE = {"nats": 1.6, "shipper@": 1.6, "detector": 3.3, "collector": 3.7, "recorder": 5.8}


@pytest.fixture
def installed(tmp_path: Path) -> list[Path]:
    """The units as on a host, with the programs that are here."""
    paths = []
    for name in NAMES:
        path = tmp_path / name.replace("@", "@9604")
        path.write_text((UNITS / name).read_text().replace(PYTHON, sys.executable))
        paths.append(path)
    return paths


def test_systemd_understands_every_line(installed: list[Path]) -> None:
    need_program("systemd-analyze")
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no"]
    command += map(str, installed)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    ours = [line for line in done.stderr.splitlines() if "crashbus" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("service", EXPOSURE)
def test_a_unit_is_confined(service: str) -> None:
    need_program("systemd-analyze")
    threshold = f"--threshold={round(10 * EXPOSURE[service])}"
    unit = str(UNITS / f"crashbus-{service}.service")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", threshold, unit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_unit_for_each_service_and_a_limit_for_each_unit() -> None:
    assert {f"crashbus-{service}.service" for service in EXPOSURE} == set(NAMES)


@pytest.mark.parametrize("unit", NAMES)
def test_a_credential_that_need_not_be_there_has_a_stand_in(unit: str) -> None:
    loaded = {value.partition(":")[0] for value in values(unit, "LoadCredential")}
    stands_in = {value.partition(":")[0] for value in values(unit, "SetCredential")}
    assert loaded == stands_in
    named = [value for value in values(unit, "Environment") if "%d/" in value]
    assert {value.rpartition("/")[2] for value in named} == loaded


def test_shippers_differ_whatever_the_file_of_settings_says() -> None:
    """EnvironmentFile= goes before Environment=, systemd.exec(5)."""
    (unit,) = (name for name in NAMES if "@" in name)
    assert not [value for value in values(unit, "Environment") if "%i" in value]
    (command,) = values(unit, "ExecStart")
    (address,) = [word for word in command.split() if word.startswith("CRASHBUS_SHIPPER_HTTP=")]
    assert address.endswith(":%i")


def in_compose(name: str) -> dict[str, Any]:
    """Return what compose.yaml says of a service."""
    services = yaml.safe_load((UNITS.parent / "compose.yaml").read_text())["services"]
    return {**services[name]}


def on_kubernetes(name: str) -> dict[str, Any]:
    """Return what the manifests say of a service's container."""
    manifests = UNITS.parent.joinpath("kubernetes").glob("*/*.yaml")
    every = [one for path in manifests for one in yaml.safe_load_all(path.read_text())]
    pods = [one["spec"]["template"]["spec"] for one in every if "template" in one.get("spec", {})]
    return next(one for pod in pods for one in pod["containers"] if one["name"] == name)


@pytest.mark.parametrize("unit", [name for name in NAMES if "recorder" not in name])
def test_a_unit_takes_no_more_memory_than_elsewhere(unit: str) -> None:
    name = unit.removeprefix("crashbus-").removesuffix(".service").removesuffix("@")
    (limit,) = values(unit, "MemoryMax")
    assert in_compose(name)["mem_limit"] == limit.lower()
    assert on_kubernetes(name)["resources"]["limits"] == {"memory": f"{limit}i"}


def test_bus_collects_its_garbage_before_it_is_killed_for_it() -> None:
    (given,) = (
        value for value in values("crashbus-nats.service", "Environment") if "GOMEMLIMIT" in value
    )
    name, _, limit = given.partition("=")
    assert in_compose("nats")["environment"][name] == limit
    assert {"name": name, "value": limit} in on_kubernetes("nats")["env"]
    assert values("crashbus-nats.service", "MemoryMax") == ["1G"]
    assert int(limit.removesuffix("MiB")) < 1024


def test_cores_that_a_recorder_writes_meet_no_limit_of_memory() -> None:
    """Memory in a file counts, even on tmpfs, where nothing can be taken back."""
    assert not values("crashbus-recorder.service", "MemoryMax")
    assert not values("crashbus-recorder.service", "MemoryHigh")
    assert "mem_limit" not in in_compose("recorder")
    assert "limits" not in on_kubernetes("recorder")["resources"]


def test_recorder_outlives_an_unwinder_that_was_killed_for_its_memory() -> None:
    """As systemd's default is, systemd.service(5), it would be stopped."""
    assert values("crashbus-recorder.service", "OOMPolicy") == ["continue"]
