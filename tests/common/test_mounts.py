"""Mounts are read again when they have changed, and only then."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.mounts import Mounts
from services.common.proc import LIVE
from services.common.resources import read_mounts
from tests.support.requirements import need_root


@pytest.fixture
def process() -> Iterator[int]:
    """A process that sees other mounts than we do."""
    need_root()
    command = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs its-own /mnt; echo; read line"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as started:
        assert started.stdout is not None and started.stdin is not None
        started.stdout.readline()
        yield started.pid
        started.stdin.close()


def test_mounts_are_read_again_when_they_have_changed(tmp_path: Path) -> None:
    need_root()
    known = Mounts()
    name = os.fsencode(tmp_path)
    assert known.seen_by(os.getpid(), LIVE) is known.seen_by(os.getpid(), LIVE)
    assert name not in known.seen_by(os.getpid(), LIVE)

    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True)
    try:
        assert known.seen_by(os.getpid(), LIVE) == read_mounts(os.getpid(), LIVE)
        assert name in known.seen_by(os.getpid(), LIVE)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert name not in known.seen_by(os.getpid(), LIVE)


def test_process_with_mounts_of_its_own_is_asked_itself(process: int) -> None:
    known = Mounts()

    assert b"its-own" in known.seen_by(process, LIVE)
    assert b"its-own" not in known.seen_by(os.getpid(), LIVE)
