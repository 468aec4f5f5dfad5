"""`doctor` hears what this host has, as it is."""

import json
import os
from pathlib import Path

import pytest

from services.common.finding import Finding
from services.recorder import pattern_file, requirements
from services.recorder.handover import mechanism
from tests.support.requirements import need_linux


def found(name: str) -> Finding:
    (finding,) = [one for one in requirements.check() if one.name == f"recorder: {name}"]
    return finding


def test_core_pattern_is_shown_with_its_owner() -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()

    assert pattern in found("core_pattern").detail


def test_mechanism_is_what_the_kernel_has() -> None:
    release = os.uname().release
    has_socket = mechanism.kernel_version(release) >= (6, 16)

    finding = found("mechanism")

    assert finding.ok
    assert finding.detail.startswith(f"Linux {release}: ")
    assert ("coredump socket" if has_socket else "pipe helper") in finding.detail


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


def test_helper_that_cannot_stand_in_for_the_socket_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_linux((6, 16), "the coredump socket")
    assert "a pipe helper keeps crashes" in found("mechanism").detail
    monkeypatch.setenv("CRASHBUS_RECORDER_HELPER", "/nowhere/corepipe")

    finding = found("mechanism")

    assert finding.ok and finding.mend
    assert "crashes are lost while the recorder is down" in finding.detail


def test_every_fault_has_a_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    for finding in requirements.check():
        assert finding.ok or finding.mend


@pytest.fixture
def pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A core_pattern of the test's own."""
    path = tmp_path / "core_pattern"
    monkeypatch.setattr(pattern_file, "PATTERN", path)
    monkeypatch.setenv("CRASHBUS_STATE", str(tmp_path / "state"))
    return path


@pytest.mark.parametrize(
    ("named", "chain", "ok", "says"),
    [
        ("|/bin/sh %P", "false", True, "/bin/sh gets no cores"),
        ("|/bin/sh %P", "true", True, "/bin/sh is started for each crash"),
        ("|/nowhere/handler %P", "true", False, "it is not there"),
        ("core", "false", True, "the kernel, which writes files"),
        ("core", "true", False, "no handler to start"),
    ],
)
def test_former_handler_is_named_with_what_becomes_of_it(
    monkeypatch: pytest.MonkeyPatch, pattern: Path, named: str, chain: str, ok: bool, says: str
) -> None:
    pattern.write_text(f"{named}\n")
    monkeypatch.setenv("CRASHBUS_RECORDER_CHAIN", chain)

    finding = found("former handler")

    assert (finding.ok, bool(finding.mend)) == (ok, not ok)
    assert says in finding.detail


def test_former_handler_is_known_while_a_recorder_runs(
    monkeypatch: pytest.MonkeyPatch, pattern: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("CRASHBUS_RECORDER_CHAIN", "true")
    ours = "|/var/lib/crashbus/recorder/corepipe /run/s %P %I %s %t + %P"
    saved = {"pattern": "|/bin/sh %P", "pipe_limit": 16, "ours": ours}
    (tmp_path / "state/recorder").mkdir(parents=True)
    (tmp_path / "state/recorder/core_pattern.json").write_text(json.dumps(saved))
    pattern.write_text(f"{ours}\n")

    assert "/bin/sh is started" in found("former handler").detail
    assert "pipe helper" in found("mechanism").detail


def test_chain_by_the_socket_is_a_fault(monkeypatch: pytest.MonkeyPatch, pattern: Path) -> None:
    pattern.write_text("|/bin/sh %P\n")
    monkeypatch.setenv("CRASHBUS_RECORDER_CHAIN", "true")
    monkeypatch.setenv("CRASHBUS_RECORDER_MECHANISM", "socket")

    assert not found("mechanism").ok
    assert found("mechanism").mend == "set CRASHBUS_RECORDER_MECHANISM=auto"
