"""What the next recorder has of a crash: there whole, or not at all."""

import errno
import os
from pathlib import Path

import pytest

from crashbus import layout
from services.common import drafts
from services.common.drafts import Awaited
from tests.support.requirements import need_root


@pytest.mark.parametrize("kind", ["another user's", "link"])
def test_what_another_put_in_the_place_of_all_drafts_is_neither_read_nor_touched(
    tmp_path: Path, kind: str
) -> None:
    need_root()
    theirs, place = tmp_path / "theirs", tmp_path / layout.DRAFTS
    theirs.mkdir(0o700)
    (theirs / "77-1").touch()
    os.utime(theirs / "77-1", (0, 0))
    if kind == "link":
        place.symlink_to(theirs)
    else:
        os.chown(theirs, 65534, 65534)
        theirs = theirs.rename(place)

    drafts.keep_waiting(tmp_path, 77, 1)
    drafts.count_back(tmp_path, 77, 1)
    drafts.remove(tmp_path, 77, 1)

    assert drafts.left(tmp_path) == []
    assert drafts.read(tmp_path, 77, 1) is None
    assert not Awaited(tmp_path, 60).is_awaited(77, 1, lambda: True)
    assert ((theirs / "77-1").stat().st_mtime, (theirs / "77-1").stat().st_size) == (0, 0)
    os.close(drafts.begin(tmp_path, 77, 1))
    assert drafts.left(tmp_path) == [(77, 1)]


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
