"""What becomes of processes that were let go."""

import os
import subprocess

import pytest

from services.recorder.handover import hold as hold_module
from services.recorder.handover.hold import Hold


def test_who_does_not_dump_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may connect to the recorder's socket, which makes it no crashing process."""
    cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    hold = Hold(os.open("/dev/null", os.O_RDONLY), 1)
    hold.belongs_to(os.pidfd_open(cat.pid))
    monkeypatch.setattr(hold_module, "_END_WITHIN", 0)

    hold.let_go("it says nothing")
    hold_module.end_those_let_go()

    assert cat.communicate(b"it lives")[0] == b"it lives"
    assert not hold_module._let_go
    hold.close()
