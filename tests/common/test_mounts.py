"""Mounts are read again when they have changed, and only then."""

import os
import subprocess
from pathlib import Path

from services.common.mounts import Mounts
from services.common.proc import LIVE
from services.common.resources import read_mounts
from tests.support.requirements import need_root


def test_mounts_are_read_again_when_they_have_changed(tmp_path: Path) -> None:
    need_root()
    known = Mounts()
    name = os.fsencode(tmp_path)
    assert known.now() is known.now()
    assert name not in known.now()

    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True)
    try:
        assert known.now() == read_mounts(os.getpid(), LIVE)
        assert name in known.now()
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert name not in known.now()


def test_view_is_ours() -> None:
    need_root()
    us = f"{os.getpid()}"

    assert Mounts().view == (LIVE.link(f"{us}/ns/mnt"), LIVE.link(f"{us}/root"))
