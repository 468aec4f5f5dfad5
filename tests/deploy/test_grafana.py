"""What Grafana is given to load by itself: of the form that its documentation tells.

Its models are those of Grafana 11.6, the newest that there are as a package of Python.

https://grafana.com/docs/grafana/latest/administration/provisioning/
"""

import json
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.support.prometheus import DEPLOY

SERVICE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]
PROVISIONING = DEPLOY / "grafana" / "provisioning"
MOUNTED = dict(one.split(":")[:2] for one in SERVICE["volumes"] if one.endswith(":ro"))
COLUMNS = 24  # of a dashboard's grid


def provisioned(kind: str) -> dict[str, Any]:
    """Return the one file of a kind of provisioning."""
    (path,) = (PROVISIONING / kind).iterdir()
    assert path.suffix in (".yaml", ".yml")  # others are not looked at
    found = yaml.safe_load(path.read_text())
    assert found.pop("apiVersion") == 1
    return dict(found)


def dashboard() -> dict[str, Any]:
    found = json.loads((DEPLOY / "grafana" / "dashboards" / "crashbus.json").read_text())
    return dict(found)


def unknown(given: Any, known: Any, place: str = "") -> Iterator[str]:
    """Give the places of what is not the same in what Grafana's own models made of it."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            yield from unknown(value, known.get(key), f"{place}/{key}")
    elif isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        for number, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from unknown(one, other, f"{place}/{number}")
    elif given != known:
        yield place


def unknown_to_grafana(found: dict[str, Any]) -> list[str]:
    register_default_plugins()  # panels and queries of each kind
    return list(unknown(found, json.loads(JSONEncoder().encode(Dashboard.from_json(found)))))


def test_grafana_knows_all_that_stands_in_the_dashboard() -> None:
    assert unknown_to_grafana(dashboard()) == []


@pytest.mark.parametrize(
    "place", [(), ("panels", 0), ("panels", 0, "targets", 0), ("panels", 0, "fieldConfig")]
)
def test_what_grafana_does_not_know_is_seen(place: tuple[str | int, ...]) -> None:
    found = part = dashboard()
    for key in place:
        part = part[key]  # type: ignore[index]
    part["misspelled"] = True

    assert unknown_to_grafana(found) == ["/".join(map(str, ("", *place, "misspelled")))]


def test_datasource_is_the_prometheus_of_the_compose_file() -> None:
    (source,) = provisioned("datasources")["datasources"]

    assert set(source) <= {"name", "uid", "type", "access", "url", "isDefault", "jsonData"}
    assert (source["type"], source["access"]) == ("prometheus", "proxy")
    assert source["url"] == "http://prometheus:9090"


def test_provider_and_home_name_what_is_mounted() -> None:
    (provider,) = provisioned("dashboards")["providers"]

    assert set(provider) <= {"name", "type", "allowUiUpdates", "options", "folder"}
    assert provider["type"] == "file"
    assert MOUNTED["./grafana/provisioning"] == "/etc/grafana/provisioning"  # Grafana's default
    assert provider["options"] == {"path": MOUNTED["./grafana/dashboards"]}
    home = PurePath(SERVICE["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    there = DEPLOY / "grafana" / "dashboards" / home.relative_to(provider["options"]["path"])
    assert json.loads(there.read_text()) == dashboard()


def test_dashboard_asks_the_datasource_that_is_provisioned() -> None:
    (source,) = provisioned("datasources")["datasources"]
    found = dashboard()

    assert found["uid"]
    assert found["title"]
    assert "id" not in found  # Grafana's own to give
    for panel in found["panels"]:
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        assert {target["refId"] for target in panel["targets"]} <= set("ABCDEF")
        assert all(target["expr"] for target in panel["targets"])


def test_panels_have_a_place_each() -> None:
    panels = dashboard()["panels"]
    taken: set[tuple[int, int]] = set()

    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        assert x + width <= COLUMNS
        cells = {(x + i, y + j) for i in range(width) for j in range(height)}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_panels_have_the_unit_of_what_they_ask_for() -> None:
    for panel in dashboard()["panels"]:
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            expression = target["expr"]
            is_time = "_seconds" in expression
            assert (unit == "s") == is_time, panel["title"]
            if not is_time:
                assert (unit in ("ops", "Bps")) == ("rate(" in expression), panel["title"]
                assert (unit == "Bps") == ("_bytes_" in expression), panel["title"]
