"""The command on a host with systemd units means the same bus and buckets as they do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crashbus.cli import site
from services.recorder.settings import RecorderSettings
from tests.support.requirements import need_program, need_root


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CRASHBUS_")]:
        monkeypatch.delenv(name)


LINES = {
    "A=file:///a b": "file:///a b",
    "A= s3://x ": "s3://x",
    "A='(?i)to\\d+ken'": "(?i)to\\d+ken",
    'A="say \\"so\\""': 'say "so"',
    "A=one\\\ntwo": "onetwo",
    "A=x # y": "x # y",
    "A=": "",
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_read_as_systemd_reads_it(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRASHBUS_A", "")
    monkeypatch.delenv("CRASHBUS_A")
    (tmp_path / "crashbus.env").write_text(f"# CRASHBUS_A=no\n;\nPATH=/no\nCRASHBUS_{line}\n")
    path = os.environ["PATH"]

    site.take_settings(tmp_path)

    assert os.environ["CRASHBUS_A"] == LINES[line]
    assert os.environ["PATH"] == path


def test_a_line_without_an_end_is_named_and_its_value_is_not(tmp_path: Path) -> None:
    (tmp_path / "crashbus.env").write_text("CRASHBUS_NATS_PASSWORD='hunter2\n")
    with pytest.raises(site.UnitSettingsUnreadable, match="CRASHBUS_NATS_PASSWORD") as caught:
        site.take_settings(tmp_path)
    assert "hunter2" not in str(caught.value)


def test_no_key_is_named_beside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3-access-key").touch()
    (tmp_path / "s3-secret-key").touch()
    monkeypatch.setenv("CRASHBUS_SHIPPER_S3_ACCESS_KEY", "mine")
    monkeypatch.setenv("CRASHBUS_SHIPPER_S3_SECRET_KEY_FILE", "")
    monkeypatch.delenv("CRASHBUS_SHIPPER_S3_SECRET_KEY_FILE")

    site.take_keys(tmp_path)

    assert "CRASHBUS_SHIPPER_S3_ACCESS_KEY_FILE" not in os.environ
    secret = os.environ["CRASHBUS_SHIPPER_S3_SECRET_KEY_FILE"]
    assert secret == str(tmp_path / "s3-secret-key")


# As on a host whose units are given these settings, which only these commands see.
WITH_UNITS = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/upper,workdir=$1/work" /etc
mkdir -p /etc/crashbus
echo CRASHBUS_NATS_URL=nats://of-the-units:4222 >/etc/crashbus/crashbus.env
"$2" -m crashbus ls || true
CRASHBUS_NATS_URL=nats://of-mine:4222 "$2" -m crashbus ls || true
"""


def test_command_asks_the_bus_of_the_units_unless_another_is_named(tmp_path: Path) -> None:
    need_root()
    need_program("unshare")
    command = ["unshare", "--mount", "--net", "sh", "-c", WITH_UNITS, "sh", str(tmp_path)]

    done = subprocess.run([*command, sys.executable], capture_output=True, text=True, timeout=60)

    first, second = done.stderr.splitlines()
    assert "nats://of-the-units:4222" in first
    assert "nats://of-mine:4222" in second


def test_installed_helper_is_found_without_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert RecorderSettings.load().helper.parts[-2:] == ("build", "corepipe")
    installed = tmp_path / "lib" / "corepipe"
    installed.parent.mkdir()
    installed.touch()
    assert RecorderSettings.load().helper == installed
