"""The table of what was tried and what became of it, at the end of a run.

A pytest plugin: with several workers the table is made where their results meet.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

PROPERTY = "fault"
RESULTS = "FAULT_RESULTS"  # variable: file to write the results to


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        {**value, "passed": report.passed}
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in getattr(report, "user_properties", [])
        if name == PROPERTY and report.when == "call"
    ]
    if not rows:
        return
    rows.sort(key=_order)
    terminalreporter.section("what was done, and what became of the crashes")
    for row in rows:
        terminalreporter.write_line(_line(row))
    if os.environ.get(RESULTS):
        _write(Path(os.environ[RESULTS]), rows)


def _order(row: dict[str, Any]) -> int:
    return int(row["order"])


def _write(results: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows in the place of those of the same faults; a long run may be made in parts."""
    names = {row["name"] for row in rows}
    former = json.loads(results.read_text()) if results.exists() else []
    all_rows = sorted([*(row for row in former if row["name"] not in names), *rows], key=_order)
    results.write_text(json.dumps(all_rows, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    ended = row.get("ended", "") if row["passed"] else "FAILED"
    return (
        f"{row['name']:58}{row['crashes']:4} crashes{row['mib']:6.0f} MiB{row['seconds']:7.1f} s"
        f"  seed {row['seed']:6}  {ended}; hit: {row.get('hit', 'nothing')}"
    )
