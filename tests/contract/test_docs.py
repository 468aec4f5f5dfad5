"""The documentation's tables are those of the code."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase

from crashbus import messages
from crashbus.message_base import VERSION
from services.collector.settings import CollectorSettings
from services.common.bus_settings import BusSettings
from services.common.settings import variable_of
from services.detector.settings import DetectorSettings
from services.recorder.settings import RecorderSettings
from services.shipper.settings import ShipperSettings
from tests.cli.support import make

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SERVICE_SETTINGS = (DetectorSettings, RecorderSettings, CollectorSettings, ShipperSettings)
SERVICES = tuple(kind.SECTION for kind in SERVICE_SETTINGS)


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


PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "deploy").rglob("*.md")])


def headings(page: Path) -> set[str]:
    """Return what a link may name behind its '#', as GitHub makes it of headings."""
    lines = (line.lstrip("# ") for line in page.read_text().splitlines() if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for path, heading in re.findall(
        r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()
    ):
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            assert heading in headings(target), heading


def test_every_setting_that_is_named_exists() -> None:
    known = {"CRASHBUS_CONFIG"} | {
        variable_of(kind, field)
        for kind in (BusSettings, *SERVICE_SETTINGS)
        for field in kind.model_fields
    }
    kinds = {".yaml", ".yml", ".service", ".sh", ".conf", ".example"}
    deploy = [path for path in (ROOT / "deploy").rglob("*") if path.suffix in kinds]
    known |= set(re.findall(r"\$\{(CRASHBUS_\w+)", "".join(path.read_text() for path in deploy)))
    for page in (*PAGES, *deploy):
        named = set(re.findall(r"CRASHBUS_[A-Z0-9_]*[A-Z0-9]", page.read_text()))
        assert not {one for one in named - known if one.removesuffix("_FILE") not in known}, page


def test_every_metric_that_is_named_exists() -> None:
    known = set()
    for service in (*SERVICES, "common"):
        metrics = vars(importlib.import_module(f"services.{service}.metrics")).values()
        for one in metrics:
            if isinstance(one, MetricWrapperBase):
                (family,) = one.describe()
                parts = ("", "_total", "_bucket", "_sum", "_count")
                known |= {f"{family.name}{part}" for part in parts}
    for page in PAGES:
        named = re.findall(rf"crashbus_(?:{'|'.join(SERVICES)})_\w*\w(?!…)", page.read_text())
        assert {one for one in named if not one.endswith("_")} <= known, page
