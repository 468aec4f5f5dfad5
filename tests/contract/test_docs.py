"""The documentation's tables are those of the code."""

import runpy
import sys
from pathlib import Path

import pytest

from crashbus import messages
from crashbus.message_base import VERSION
from tests.cli.support import make

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


def test_subjects_are_as_the_page_says() -> None:
    page = (DOCS / "wire-contract.md").read_text()
    made = make(destinations=("file:///a",))
    letter = made.failure()
    assert letter.work is not None
    for message in (made.event, made.manifest, made.receipts()[0], letter, letter.work):
        (row,) = (
            line
            for line in page.splitlines()
            if f"| [{type(message).__name__}](" in line and line.startswith("| `crash.")
        )
        told, published = row.split("`")[1].split("."), message.subject.split(".")
        assert len(told) == len(published)
        for place, token in zip(told, published, strict=True):
            assert place == token or place.startswith("<")


def test_every_link_inside_the_page_leads_somewhere() -> None:
    page = (DOCS / "wire-contract.md").read_text()
    headings = {
        line.lstrip("# ").lower().replace(" ", "-")
        for line in page.splitlines()
        if line.startswith("#")
    }
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links <= headings
