"""The collector's metrics."""

import re
from pathlib import Path

from services.collector import metrics


def test_faults_of_each_task_are_there_before_the_first() -> None:
    """A counter that begins with its first event has no rise that an alert could see."""
    code = "".join(path.read_text() for path in Path(metrics.__file__).parent.rglob("*.py"))
    counted = set(re.findall(r"FAULTS\.labels\(\"(\w+)\"\)", code))

    (faults,) = metrics.FAULTS.collect()
    there = {sample.labels["task"] for sample in faults.samples}

    assert "gather" in counted
    assert counted <= there
