"""deploy/.env.example tells all that a user can decide."""

import re
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"
ASKED = re.compile(r"\$\{(\w+)")
TOLD = re.compile(r"^#(\w+)=", re.M)


def test_all_that_the_compose_file_asks_is_told() -> None:
    asked = set(ASKED.findall((DEPLOY / "compose.yaml").read_text()))
    told = TOLD.findall((DEPLOY / ".env.example").read_text())

    of_compose = {"COMPOSE_FILE", "COMPOSE_PROFILES"}
    assert asked == set(told) - of_compose
    assert len(told) == len(set(told))
    assert of_compose <= set(told)


def test_it_decides_nothing_as_it_stands() -> None:
    lines = (DEPLOY / ".env.example").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []


def test_head_of_the_agent_s_file_tells_what_that_asks() -> None:
    text = (DEPLOY / "compose.agent.yaml").read_text()
    told = re.findall(r"^#   (\w+)=", text, re.M)
    assert set(ASKED.findall(text)) <= set(told)
