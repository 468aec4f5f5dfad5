"""The documentation's tables are those of the code."""

import runpy
import sys
from pathlib import Path

import pytest

from crashbus import messages
from crashbus.messages import VERSION

DOCS = Path(__file__).parents[2] / "docs"


def test_the_made_parts_are_not_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(DOCS / "make_tables.py")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    runpy.run_path(script, run_name="__main__")


def test_every_message_and_its_subject_is_told() -> None:
    page = (DOCS / "wire-contract.md").read_text()
    assert f"Version: `{VERSION}`." in page
    for kind in messages.ALL:
        assert f"[{kind.__name__}](#{kind.__name__.lower()})" in page
        assert f"| `{kind.SUBJECT.removesuffix('>')}<host>" in page


def test_every_link_inside_the_page_leads_somewhere() -> None:
    page = (DOCS / "wire-contract.md").read_text()
    headings = {
        line.lstrip("# ").lower().replace(" ", "-")
        for line in page.splitlines()
        if line.startswith("#")
    }
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links <= headings
