"""Tests of other folders once more, on the kernels of older distributions.

`make test-kernels` runs them; CI does not, because without KVM they take too long.
"""

import os
import re

import pytest

from tests.kernels import machine
from tests.support.requirements import CAME_WITH, IN_MACHINE

RELEASES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie"}

_CAPTURE = "tests/recorder/test_capture.py::test_a_crash_leaves_files_that_say_what_happened"
# What differs most between kernels. Whole files may be named instead, see the Makefile.
TESTS = os.environ.get("KERNEL_TESTS", "").split() or [
    "tests/detector/test_requirements.py::test_this_host_has_all",
    "tests/recorder/test_requirements.py::test_mechanism_is_what_the_kernel_has",
    "tests/recorder/test_core_pattern.py::test_core_pattern_is_put_back_after_sigterm[pipe]",
    f"{_CAPTURE}[pipe-threads]",
    "tests/recorder/test_every_process.py::test_process_in_namespaces_of_its_own[auto]",
    "tests/recorder/test_orphans.py::test_crash_without_a_recorder_is_captured_by_the_next_one",
    "tests/detector/test_kernel.py::test_death_is_told_in_full[null_pointer]",
    "tests/detector/test_kernel.py::test_container_is_known_when_the_process_is_gone",
    "tests/detector/test_kernel.py::test_oom_kill",
]
MEMORY = 2048  # MiB
LITTLE_MEMORY = 1024  # MiB; the services and pytest take half of it
WITHIN = 7200  # seconds; with KVM it is a minute

of_each_kernel = pytest.mark.parametrize("version", RELEASES)
pytestmark = pytest.mark.timeout(WITHIN + 60)


def run(version: str, *tests: str, memory: int) -> None:
    """Have tests pass on a kernel."""
    command = (
        f"uname -r; export {IN_MACHINE}=1 CI=true NO_COLOR=1\n"
        # Without KVM all takes ten times as long.
        ".venv/bin/python -m pytest -p no:cacheprovider -o timeout=1200 -v --durations 10 "
        + " ".join(f"'{test}'" for test in tests)
    )
    outcome = machine.run(machine.kernel(RELEASES[version]), command, memory, WITHIN)
    assert outcome.status == 0, f"{outcome.console[-3000:]}\n{outcome.output}"
    skipped = re.findall(r"^SKIPPED .*", outcome.output, re.MULTILINE)
    assert all(CAME_WITH in line for line in skipped)
    assert outcome.output.startswith(f"{version}.")
    assert re.search(r"\d+ passed", outcome.output)


@of_each_kernel
def test_crashes_are_seen_and_captured(version: str) -> None:
    run(version, *TESTS, memory=MEMORY)


@of_each_kernel
def test_process_that_the_host_s_oom_killer_chose_is_told(version: str) -> None:
    run(version, "tests/kernels/global_oom.py", memory=LITTLE_MEMORY)
