"""`doctor` hears what this host has, as it is."""

import os
from pathlib import Path

import pytest

from services.common.finding import Finding
from services.recorder import requirements


def found(name: str) -> Finding:
    (finding,) = [one for one in requirements.check() if one.name == f"recorder: {name}"]
    return finding


def test_core_pattern_is_shown_with_its_owner() -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()

    assert pattern in found("core_pattern").detail


def test_spool_that_is_a_link_is_a_fault_with_a_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spool").symlink_to("/etc")
    monkeypatch.setenv("CRASHBUS_SPOOL", str(tmp_path / "spool"))

    finding = found("spool")

    assert not finding.ok
    assert finding.mend == f"rm {tmp_path / 'spool'}"


def test_missing_helper_is_a_fault_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASHBUS_RECORDER_MECHANISM", "pipe")
    monkeypatch.setenv("CRASHBUS_RECORDER_HELPER", "/nowhere/corepipe")

    assert not found("mechanism").ok
    assert os.uname().release in found("mechanism").detail


def test_every_fault_has_a_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    for finding in requirements.check():
        assert finding.ok or finding.mend
