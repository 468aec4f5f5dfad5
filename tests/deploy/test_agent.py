"""The compose file of an agent: what captures, of the same services, with a key each."""

from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads compose's own tags as the values that they stand before."""


def _plain(loader: Loader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    assert isinstance(node, yaml.SequenceNode)
    return loader.construct_sequence(node, deep=True)


Loader.add_multi_constructor("!", _plain)


def test_an_agent_is_the_capturing_services_of_the_compose_file_with_a_key_each() -> None:
    whole = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    agent = yaml.load((DEPLOY / "compose.agent.yaml").read_text(), Loader)

    assert set(agent["services"]) == {"detector", "guard", "recorder", "collector"}
    for name, service in agent["services"].items():
        assert service["extends"] == {"file": "compose.yaml", "service": name}
        assert name in whole["services"]
        assert set(service.get("depends_on", {})) <= set(agent["services"])
        if name == "guard":
            continue
        assert service["secrets"] == ["nats_ca"]
        key = f"${{CRASHBUS_KEYS:-./keys}}/{name}:/run/keys:ro"
        assert key in whole["services"][name]["volumes"]
    volumes = {
        volume.partition(":")[0]
        for name in agent["services"]
        for volume in whole["services"][name].get("volumes", [])
        if isinstance(volume, str) and not volume.startswith(("/", "$"))
    }
    assert volumes == set(agent["volumes"])
