"""The command on a host with systemd units means the same bus and buckets as they do."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashbus.cli import env_file, site
from services.recorder.settings import RecorderSettings
from tests.support.requirements import need_program, need_root


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Take what is set out of the environment; what a test sets does not outlive it."""
    with patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("CRASHBUS_")]:
            del os.environ[name]
        yield


LINES = {
    "A=file:///a b": "file:///a b",
    "A= s3://x ": "s3://x",
    "A='(?i)to\\d+ken'": "(?i)to\\d+ken",
    'A="say \\"so\\""': 'say "so"',
    "A=one\\\ntwo": "onetwo",
    "A=x # y": "x # y",
    "A=": "",
    "A=it's  so": "it's  so",
    "A='x' 'y' z": "xyz",
    "A='x\ny'": "x\ny",
    'A="\\$HOME \\`\\d\\\\\\\n"': "$HOME `\\d\\",
    "A=\\  \\'x\\\n ": "  'x",
    "A = x": "x",
    "A=old\nCRASHBUS_A=new": "new",
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_read_as_systemd_reads_it(line: str, tmp_path: Path) -> None:
    (tmp_path / "crashbus.env").write_text(f"# CRASHBUS_A=no\n;\nPATH=/no\nCRASHBUS_{line}\n")
    path = os.environ["PATH"]

    site.take_settings(tmp_path)

    assert os.environ["CRASHBUS_A"] == LINES[line]
    assert os.environ["PATH"] == path


# What systemd reads settings with for users' programs, environment.d(5): but for variables as here.
GENERATOR = "/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator"
_PIECES = ("'", '"', "\\", "\n", " ", "\t", "#", ";", "=", "a", "`", "\nA=", "\nB=", "\\\n")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(_PIECES), max_size=25))
def test_any_file_is_read_as_systemd_reads_it(pieces: list[str]) -> None:
    need_program(GENERATOR)
    text = f"A={''.join(pieces)}"
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home, "environment.d")
        directory.mkdir()
        (directory / "x.conf").write_text(text)
        environment = {"XDG_CONFIG_HOME": home}
        done = subprocess.run([GENERATOR], env=environment, capture_output=True, text=True)

    read = {setting.name: setting.value for setting in env_file.read(text) if setting.value}

    printed = dict(line.split("=", 1) for line in done.stdout.splitlines())
    theirs = {name: _as_printed(value) for name, value in printed.items() if name in ("A", "B")}
    assert read.keys() & {"A", "B"} <= theirs.keys()
    # The generator ignores some empty values, and leaves in force what was set before.
    assert all(read.get(name) == value for name, value in theirs.items() if value)


def _as_printed(value: str) -> str:
    """Return what the generator printed in double quotes, or as it is."""
    if not value.startswith('"'):
        return value
    escaped = {"n": "\n", "t": "\t"}
    return re.sub(r"\\(.)", lambda one: escaped.get(one[1], one[1]), value[1:-1])


def test_what_cannot_be_read_is_told_without_values_and_ends_no_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, told in (
        (
            b"CRASHBUS_A=1\nCRASHBUS_NATS_PASSWORD='hunter2\n",
            "value of 'CRASHBUS_NATS_PASSWORD' has no",
        ),
        (b"CRASHBUS_NATS_B=hunter2\xff\n", "no text"),
        (b"# hunter2\\\nCRASHBUS_NATS_D=\n", "ends in a backslash"),
        (b"CRASHBUS_NATS_C=hunter2\0\n", "no text"),
    ):
        (tmp_path / "crashbus.env").write_bytes(content)
        site.take_settings(tmp_path)
        said = capsys.readouterr().err
        assert told in said
        assert "hunter2" not in said
    assert os.environ["CRASHBUS_A"] == "1"


def test_no_key_is_named_beside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3-access-key").touch()
    (tmp_path / "s3-secret-key").touch()
    monkeypatch.setenv("CRASHBUS_SHIPPER_S3_ACCESS_KEY", "mine")

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
echo "CRASHBUS_SHIPPER_GIVE_UP='never" >>/etc/crashbus/crashbus.env
"$2" -m crashbus ls --host demo || true
CRASHBUS_NATS_URL=nats://of-mine:4222 "$2" -m crashbus ls || true
mkdir -p /etc/crashbus/keys/operator
echo none >/etc/crashbus/keys/operator/nkey
"$2" -m crashbus ls || true
"$2" -m crashbus --nats-url nats://of-mine:4222 shipper || true
"$2" -m crashbus receive --help >/dev/null
"""


def test_command_asks_the_bus_of_the_units_unless_another_is_named(tmp_path: Path) -> None:
    need_root()
    need_program("unshare")
    command = ["unshare", "--mount", "--net", "sh", "-c", WITH_UNITS, "sh", str(tmp_path)]

    done = subprocess.run([*command, sys.executable], capture_output=True, text=True, timeout=60)

    told = "crashbus: /etc/crashbus/crashbus.env: the quote that begins the value of "
    warning = f"{told}'CRASHBUS_SHIPPER_GIVE_UP' has no end\n"
    nothing, first, second, third, shipper = done.stderr.split(warning)
    assert not nothing
    assert "nats://of-the-units:4222" in first
    assert "nats://of-mine:4222" in second
    assert "CRASHBUS_NATS_NKEY is no seed" in third
    assert "CRASHBUS_SHIPPER_GIVE_UP" in shipper
    assert "NKEY" not in shipper


def test_installed_helper_is_found_without_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert RecorderSettings.load().helper.parts[-2:] == ("build", "corepipe")
    installed = tmp_path / "lib" / "corepipe"
    installed.parent.mkdir()
    installed.touch()
    assert RecorderSettings.load().helper == installed
