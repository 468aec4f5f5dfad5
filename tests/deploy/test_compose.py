"""The order in which the services of deploy/compose.yaml start: each when what it needs works."""

import re
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
ON_THE_BUS = [
    name for name, one in SERVICES.items() if "CRASHBUS_NATS_URL" in one.get("environment", {})
]
HEALTHY = {"condition": "service_healthy"}


def has_health_check(name: str) -> bool:
    """Tell whether compose, the target of its image, or what that is made from has one."""
    service = SERVICES[name]
    if "healthcheck" in service:
        return not service["healthcheck"].get("disable", False)
    file = (DEPLOY / "Dockerfile").read_text()
    stages = re.findall(
        r"^FROM (?:--\S+ )?(\S+) AS (\S+)\n((?:(?!FROM ).*\n)*)", file, re.MULTILINE
    )
    made = {name: (base, steps) for base, name, steps in stages}
    stage = service["build"]["target"]
    while stage in made:
        stage, steps = made[stage]
        if said := re.findall(r"^HEALTHCHECK +(NONE|--)", steps, re.MULTILINE):
            return bool(said[-1] != "NONE")
    return False


def test_whoever_speaks_to_the_bus_waits_until_it_is_healthy() -> None:
    assert {"detector", "recorder", "collector", "shipper", "cli"} == {*ON_THE_BUS}
    for name in ON_THE_BUS:
        assert SERVICES[name]["depends_on"]["nats"] == HEALTHY


def test_the_bus_waits_for_its_keys() -> None:
    assert SERVICES["nats"]["depends_on"]["keys"] == {"condition": "service_completed_successfully"}


def test_core_pattern_is_taken_when_somebody_can_put_it_back() -> None:
    assert SERVICES["recorder"]["depends_on"]["guard"] == HEALTHY


def test_whatever_others_wait_for_can_be_healthy() -> None:
    waits = [how for one in SERVICES.values() for how in one.get("depends_on", {}).items()]
    awaited = {name for name, how in waits if how == HEALTHY}

    assert awaited == {"nats", "guard"}
    assert all(map(has_health_check, awaited))
    assert has_health_check("collector") and not has_health_check("cli")  # as the images say
