"""What a contributor's machine may lack. Under CI nothing may be lacking."""

import os
import shutil
from pathlib import Path

import pytest


def lacking(reason: str) -> None:
    """Skip the test for this reason; under CI, fail instead."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must be able to run this: {reason}")
    pytest.skip(reason)


def need_root() -> None:
    if os.geteuid() != 0:
        lacking("needs root")


def need_program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        lacking(f"needs {name}, see deploy/setup.sh")
    assert path is not None
    return path


def need_btf() -> None:
    if not Path("/sys/kernel/btf/vmlinux").exists():
        lacking("needs a kernel with BTF")
