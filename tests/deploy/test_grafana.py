"""What Grafana is given to load by itself: of the form that its documentation tells.

https://grafana.com/docs/grafana/latest/administration/provisioning/
"""

import json
from pathlib import PurePath
from typing import Any

import yaml

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
