"""What is read of a crashed process's /proc."""

from pathlib import Path

from services.recorder import facts


def test_limits() -> None:
    limits = facts.parse_limits(Path("/proc/self/limits").read_text())

    assert limits["Max open files"].endswith(" files")
    assert len(limits) > 10
    assert facts.parse_limits("garbage\n\nx\n") == {}
