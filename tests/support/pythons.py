"""Interpreters of several versions, as they may be installed."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.requirements import lacking


def interpreter(version: tuple[int, int]) -> Path:
    """Return a CPython of a version: Debian's, one on PATH, or one that pyenv has built."""
    found = _find(version)
    if found is None:
        lacking("needs python{}.{}, on PATH or of pyenv".format(*version))
    assert found is not None
    return found


def is_installed(version: tuple[int, int]) -> bool:
    return _find(version) is not None


def _find(version: tuple[int, int]) -> Path | None:
    for place in _places("{}.{}".format(*version)):
        if _version(place) == version:
            return place.resolve()
    return None


def _places(version: str) -> Iterator[Path]:
    yield Path("/usr/bin") / f"python{version}"
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    # Not one of its shims: they are scripts that start what they choose.
    yield from sorted(root.glob(f"versions/{version}.*/bin/python{version}"))
    if found := shutil.which(f"python{version}"):
        yield Path(found)


def _version(python: Path) -> tuple[int, int] | None:
    code = "import sys; print(sys.version_info[0], sys.version_info[1])"
    try:
        shown = subprocess.run([python, "-Ic", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor = shown.stdout.split()
    return int(major), int(minor)
