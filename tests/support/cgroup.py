"""Cgroups of a test's own, of version 1 or 2."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.requirements import lacking


@contextmanager
def memory_cgroup(name: str) -> Iterator[Path]:
    """Make a cgroup with the memory controller, and remove it."""
    v1 = Path("/sys/fs/cgroup/memory")
    base = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"crashbus-test-{os.getpid()}"
    made = [base.joinpath(*Path(name).parts[:n]) for n in range(len(Path(name).parts) + 1)]
    try:
        for one in made:
            one.mkdir()
            if base.parent != v1:
                (one.parent / "cgroup.subtree_control").write_text("+memory")
    except OSError as error:
        lacking(f"needs a memory cgroup of its own: {error}")
    try:
        yield made[-1]
    finally:
        for one in reversed(made):
            one.rmdir()


@contextmanager
def pids_cgroup(most: int) -> Iterator[Path]:
    """Make a cgroup that holds so many processes at most, and remove it once it is empty."""
    v1 = Path("/sys/fs/cgroup/pids")
    made = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"crashbus-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / "pids.max").write_text(str(most))
    except OSError as error:
        lacking(f"needs a cgroup that limits processes: {error}")
    try:
        yield made
    finally:
        made.rmdir()


def limit(group: Path, size: int) -> None:
    v1 = group / "memory.limit_in_bytes"
    (v1 if v1.exists() else group / "memory.max").write_text(str(size))


def cgroup_path(group: Path) -> str:
    """Return a cgroup's path as /proc/<pid>/cgroup shows it."""
    v1 = Path("/sys/fs/cgroup/memory")
    return f"/{group.relative_to(v1 if v1.is_dir() else '/sys/fs/cgroup')}"


class Freezer:
    """A cgroup whose processes can be frozen, of version 1 or 2."""

    def __init__(self) -> None:
        v1, hybrid = Path("/sys/fs/cgroup/freezer"), Path("/sys/fs/cgroup/unified")
        self._is_v1 = v1.is_dir()
        root = v1 if self._is_v1 else hybrid if hybrid.is_dir() else Path("/sys/fs/cgroup")
        self._place = root / f"crashbus-freezer-{os.getpid()}"
        self.procs = self._place / "cgroup.procs"
        try:
            self._place.mkdir()
        except OSError as error:
            lacking(f"needs a cgroup that can be frozen: {error}")

    def pids(self) -> list[int]:
        """Return who is in it."""
        return [int(pid) for pid in self.procs.read_text().split()]

    def freeze(self) -> None:
        if self._is_v1:
            (self._place / "freezer.state").write_text("FROZEN")
        else:
            (self._place / "cgroup.freeze").write_text("1")

    def thaw(self) -> None:
        if self._is_v1:
            (self._place / "freezer.state").write_text("THAWED")
        else:
            (self._place / "cgroup.freeze").write_text("0")

    def remove(self) -> None:
        """Let go of all that is in it."""
        self.thaw()
        for pid in self.pids():
            (self._place.parent / "cgroup.procs").write_text(str(pid))
        self._place.rmdir()
