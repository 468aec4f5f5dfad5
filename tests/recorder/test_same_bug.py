"""Fingerprints of real crashes: the same for each build of the same bug."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crashbus import elf
from tests.recorder.conftest import MakeRecorder
from tests.support.recorder import RecorderService, crash
from tests.support.requirements import need_program

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


async def test_place_of_memory_and_of_files_does_not_count(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    recorder = recorder_with()
    await recorder.start()
    program = build(tmp_path / "one", "-O0")
    other = tmp_path / "another" / "host"
    other.mkdir(parents=True)
    moved = Path(shutil.copy(program, other))

    by_chance = await fingerprint_of(recorder, program)
    by_none = await fingerprint_of(recorder, need_program("setarch"), "-R", moved)

    assert by_chance == by_none


_CPP = """
namespace {
template <class T> struct Box {
    T *at;
    __attribute__((noinline)) long get(long add) const { return *at + add; }
};
struct Base { virtual long go(int *at) = 0; };
struct One : Base {
    __attribute__((noinline)) long go(int *at) override {
        return Box<CONTENT>{(CONTENT *)at}.get(1) + 1;
    }
};
struct Two : Base {
    __attribute__((noinline)) long go(int *at) override {
        return Box<CONTENT>{(CONTENT *)at}.get(1) + 2;
    }
};
}
namespace app {
template <class F> __attribute__((noinline)) long call(F f) { return f() + 1; }
}
int main(int count, char **) {
    One one;
    Two two;
    Base *base = count > 1 ? (Base *)&two : &one;
    return app::call([=]() __attribute__((noinline)) { return base->go(nullptr) + 3; }) + 1;
}
"""


def build_cpp(directory: Path, *options: str) -> Path:
    need_program("g++")
    directory.mkdir()
    (directory / "bug.cc").write_text(_CPP)
    program = directory / "program"
    options = (*options, "-Wl,--build-id")
    subprocess.run(["g++", *options, "-o", program, directory / "bug.cc"], check=True)
    return program


async def test_builds_of_the_same_bug_match_in_cpp(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    """Templates, lambdas, anonymous namespaces and virtual functions, with and without -g."""
    recorder = recorder_with()
    await recorder.start()
    builds = [("-g", "-O0"), ("-g", "-O2"), ("-O2",), ("-g", "-O2", "-no-pie")]
    contents = ["int", "int", "int", "short"]

    found = [
        await fingerprint_of(
            recorder, build_cpp(tmp_path / str(number), *options, f"-DCONTENT={content}")
        )
        for number, (options, content) in enumerate(zip(builds, contents, strict=True))
    ]
    other = await fingerprint_of(recorder, tmp_path / "1" / "program", "another class")

    assert len(set(found)) == 1, found
    assert other not in found


def stripped(program: Path, debug_directory: Path) -> Path:
    """Return the program without symbols, and lay these down by its build ID."""
    bare = program.with_name("stripped") / program.name
    bare.parent.mkdir()
    with program.open("rb") as file:
        build_id = elf.build_id(file.fileno())
    assert build_id
    place = debug_directory / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    place.parent.mkdir(parents=True)
    subprocess.run(["objcopy", "--only-keep-debug", program, place], check=True)
    subprocess.run(["strip", "-o", bare, program], check=True)
    return bare


@pytest.fixture
def debug_directory() -> Iterator[Path]:
    """A directory that everyone can read, as the unwinder's user has to."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        directory = Path(made)
        directory.chmod(0o755)
        yield directory


@pytest.mark.parametrize("language", ["c", "c++"])
async def test_stripped_program_with_its_debug_file_matches(
    recorder_with: MakeRecorder, tmp_path: Path, debug_directory: Path, language: str
) -> None:
    recorder = recorder_with(recorder_debug_directory=debug_directory)
    await recorder.start()
    if language == "c":
        program = build(tmp_path / "one", "-O2")
    else:
        program = build_cpp(tmp_path / "one", "-g", "-O2", "-DCONTENT=int")

    whole = await fingerprint_of(recorder, program)
    bare = await fingerprint_of(recorder, stripped(program, debug_directory))

    assert whole == bare


async def test_stripped_program_is_known_by_its_build(
    recorder_with: MakeRecorder, tmp_path: Path, debug_directory: Path
) -> None:
    """Without any name the same bug matches on each host, and another bug does not."""
    recorder = recorder_with()
    await recorder.start()
    program = stripped(build_cpp(tmp_path / "x", "-O2", "-DCONTENT=int"), debug_directory)
    moved = Path(shutil.copy(program, tmp_path))

    first, again = [await fingerprint_of(recorder, one) for one in (program, moved)]
    other = await fingerprint_of(recorder, program, "another class")

    assert first == again
    assert first != other


async def test_stripped_program_is_linked_with_the_same_build_with_symbols(
    recorder_with: MakeRecorder, tmp_path: Path, debug_directory: Path
) -> None:
    recorder = recorder_with()
    await recorder.start()
    whole = build_cpp(tmp_path / "x", "-g", "-O2", "-DCONTENT=int")
    bare = stripped(whole, debug_directory)
    rebuilt = build_cpp(tmp_path / "y", "-g", "-O1", "-DCONTENT=int")
    commands = [(whole,), (bare,), (bare, "another class"), (rebuilt,)]

    found = []
    for command in commands:
        pid, _ = crash(*command)
        found.append(await recorder.captured(pid))

    with_symbols, without, other, another_build = found
    assert with_symbols.fingerprint != without.fingerprint
    assert with_symbols.build_fingerprint == without.build_fingerprint is not None
    assert other.build_fingerprint not in (None, without.build_fingerprint)
    assert another_build.fingerprint == with_symbols.fingerprint
    assert another_build.build_fingerprint not in (None, with_symbols.build_fingerprint)


async def test_another_bug_of_the_same_program_does_not_match(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    recorder = recorder_with()
    await recorder.start()

    one = await fingerprint_of(recorder, build(tmp_path / "one", "-O0"))
    other = await fingerprint_of(recorder, build(tmp_path / "two", "-O0", bug="print"))

    assert one != other
