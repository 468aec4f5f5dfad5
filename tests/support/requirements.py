"""What a contributor's machine may lack. Under CI nothing may be lacking."""

import os
import shutil
from pathlib import Path

import pytest

from services.recorder.handover.mechanism import kernel_version

IN_MACHINE = "IN_TEST_MACHINE"  # set in the virtual machines of tests/kernels
CAME_WITH = "came with Linux"  # in the reason for skipping a test there


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


def need_linux(version: tuple[int, int], what: str) -> None:
    """Skip the test where the kernel is older, in the machines of tests/kernels under CI too."""
    if kernel_version(os.uname().release) >= version:
        return
    reason = f"{what} {CAME_WITH} {version[0]}.{version[1]}"
    if IN_MACHINE in os.environ:
        pytest.skip(reason)
    lacking(reason)
