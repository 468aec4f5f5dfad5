"""Fingerprints of real crashes: the same for each build of the same bug."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.recorder.conftest import MakeRecorder
from tests.support.recorder import RecorderService, crash

_SOURCE = """
#include <stdlib.h>
#include <string.h>
static inline int look(volatile int *at) { return *at + 1; }
__attribute__((noinline)) int BUG(volatile int *at) { return look(at) + 2; }
__attribute__((noinline)) int deeper(int left, volatile int *at) {
    return (left ? deeper(left - 1, at) : BUG(at)) + 3;
}
int main(int count, char **arguments) {
    return deeper(count > 1 ? atoi(arguments[1]) : 2, NULL) == 4 && arguments[0];
}
"""


def build(directory: Path, *options: str, bug: str = "parse") -> Path:
    directory.mkdir()
    (directory / "bug.c").write_text(_SOURCE)
    program = directory / "program"
    subprocess.run(
        ["gcc", "-g", f"-DBUG={bug}", *options, "-o", program, directory / "bug.c"], check=True
    )
    return program


async def fingerprint_of(recorder: RecorderService, *command: str | Path) -> str:
    pid, _ = crash(*command)
    record = await recorder.captured(pid)
    snapshot = json.loads(recorder.file(pid, "snapshot").read_bytes())
    assert record.fingerprint is not None, snapshot["Notes"]
    assert snapshot["Fingerprint"] == record.fingerprint
    return record.fingerprint


@pytest.mark.parametrize("options", [("-O2",), ("-O0", "-no-pie"), ("-O2", "-static")])
async def test_builds_of_the_same_bug_match(
    recorder_with: MakeRecorder, tmp_path: Path, options: tuple[str, ...]
) -> None:
    recorder = recorder_with()
    await recorder.start()

    plain = await fingerprint_of(recorder, build(tmp_path / "one", "-O0"))
    built = await fingerprint_of(recorder, build(tmp_path / "two", *options), "7")

    assert plain == built


async def test_another_bug_of_the_same_program_does_not_match(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    recorder = recorder_with()
    await recorder.start()

    one = await fingerprint_of(recorder, build(tmp_path / "one", "-O0"))
    other = await fingerprint_of(recorder, build(tmp_path / "two", "-O0", bug="print"))

    assert one != other
