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
    rows.sort(key=lambda row: row["order"])
    terminalreporter.section("what was done, and what became of the crashes")
    for row in rows:
        terminalreporter.write_line(_line(row))
    if os.environ.get(RESULTS):
        Path(os.environ[RESULTS]).write_text(json.dumps(rows, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    ended = row.get("ended", "") if row["passed"] else "FAILED"
    return (
        f"{row['name']:58}{row['crashes']:4} crashes{row['mib']:6.0f} MiB{row['seconds']:7.1f} s"
        f"  seed {row['seed']:6}  {ended}"
    )
