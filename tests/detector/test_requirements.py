"""What the detector says of a host that lacks something."""

import importlib.util
import os
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from services.detector import headers, requirements
from services.detector.settings import DetectorSettings
from tests.support.requirements import need_btf, need_root

Uname = namedtuple("Uname", "release")


def test_this_host_has_all() -> None:
    need_root()
    need_btf()
    assert [one for one in requirements.check() if not one.ok] == []


def test_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: Uname("5.4.0-150-generic"))
    finding = requirements._kernel()
    assert (finding.ok, finding.detail) == (False, "5.4.0-150-generic")
    assert "5.8" in finding.mend


def test_directory_that_is_roots_alone_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    need_root()
    (tmp_path / "tracing").mkdir(mode=0o700)
    monkeypatch.setattr(requirements, "_TRACEFS", tmp_path / "tracing" / "events")
    os.seteuid(65534)
    try:
        finding = requirements._tracefs()
    finally:
        os.seteuid(0)
    assert (finding.ok, finding.detail.partition(";")[0]) == (True, "not ours to see")


@pytest.mark.parametrize("content", [None, b"", b"\x9f\xeb\x01 cut short"])
def test_no_type_information(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "vmlinux"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(requirements, "BTF_FILE", file)
    finding = requirements._btf()
    assert not finding.ok
    assert finding.mend


def test_no_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    finding = requirements._bcc()
    assert not finding.ok
    assert "python3-bpfcc" in finding.mend


def test_the_other_bcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bcc.py").write_text("class Lattice: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bcc", raising=False)
    finding = requirements._bcc()
    assert not finding.ok
    assert "PyPI" in finding.mend


def test_no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(headers, "_SYSTEM", tmp_path)
    finding = requirements._headers()
    assert not finding.ok
    assert "linux-libc-dev" in finding.mend
    with pytest.raises(FileNotFoundError), headers.kernel_source():
        pass


def test_signals_by_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASHBUS_DETECTOR_SIGNALS", "segv, SIGINT,15,SEGV")
    assert DetectorSettings.load().signals == ("SIGSEGV", "SIGINT", "SIGTERM")
    assert DetectorSettings.load().signal_numbers == {11, 2, 15}
