"""What AppScope's library left inside a container, or another put there for us, is brought out."""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from crashbus.layout import Kind
from crashbus.messages import SignalEvent
from services.collector.appscope import _Watched
from tests.collector.stand_in import signal_event
from tests.support.requirements import need_root

_WAITS = (
    "import os, sys; os.chroot(sys.argv[1]); os.chdir('/'); print(flush=True); sys.stdin.read()"
)
EPOCH = int(time.time()) + 86400  # after any event


@dataclass
class Contained:
    """A process with a root of its own, as in a container.

    Attributes:
        place: where the library writes there, as we see it.
    """

    process: subprocess.Popen[bytes]
    place: Path

    @property
    def event(self) -> SignalEvent:
        return signal_event(self.process.pid, "handled")

    def write(self, files: dict[str, bytes]) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        for kind, content in files.items():
            (self.place / f"{kind}_{EPOCH}").write_bytes(content)

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def contained(tmp_path: Path) -> Iterator[Contained]:
    need_root()
    root = tmp_path / "root"
    root.mkdir()
    command = [sys.executable, "-c", _WAITS, root]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    made = Contained(process, root / "tmp/appscope" / str(process.pid))
    yield made
    made.end()


def test_last_files_of_a_process_are_seen_when_it_has_ended(contained: Contained) -> None:
    with _Watched(contained.event) as watched:
        contained.write({"info": b"one"})
        assert watched.look()
        contained.write({"backtrace": b"two"})
        contained.end()

        assert not watched.look()

        (one,) = watched._sets.values()
        assert set(one.files) == {Kind.INFO, Kind.BACKTRACE}


def test_process_that_has_the_pid_of_one_that_ended_is_not_looked_into(
    contained: Contained,
) -> None:
    """As after a restart of the collector, with a note of a watch that is long over."""
    process = contained.event.process.model_copy(update={"start_ticks": 1})
    contained.write({"info": b"of another"})

    with _Watched(contained.event.model_copy(update={"process": process})) as watched:
        assert not watched.look()
        assert not watched._sets
