"""What the next recorder has of a crash: there whole, or not at all."""

import errno
import os
from pathlib import Path

import pytest

from crashbus import layout
from services.common import drafts


def test_draft_that_finds_no_room_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_room)
        with pytest.raises(OSError, match="No space left"):
            drafts.begin(tmp_path, 77, 1_700_000_000)

    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    assert not list((tmp_path / layout.DRAFTS).iterdir())
