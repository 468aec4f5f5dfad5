"""Fingerprints of real crashes: the same for each build of the same bug."""

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from crashbus import elf
from tests.support import go
from tests.support.core_pattern import core_pattern_kept
from tests.support.recorder import RecorderService, crash
from tests.support.requirements import lacking, need_program

DEBUG = Path("/usr/lib/debug")


def debug_place(directory: Path, program: Path) -> Path:
    """Return where a directory has the debug information of a program."""
    with program.open("rb") as file:
        build_id = elf.build_id(file.fileno())
    assert build_id
    return directory / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"


@pytest.fixture(scope="module")
def debug_directory(readable_directory: Path) -> Path:
    """A directory with the C library's debug information."""
    loaded = Path("/proc/self/maps").read_text().split()
    libc = next(Path(path) for path in loaded if path.endswith("/libc.so.6"))
    if not debug_place(DEBUG, libc).exists():
        lacking("needs libc6-dbg, see deploy/setup.sh")
    place = debug_place(readable_directory, libc)
    place.parent.mkdir(parents=True)
    place.symlink_to(debug_place(DEBUG, libc))
    return readable_directory


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["symbols", "none"])
async def recorder(
    request: pytest.FixtureRequest, debug_directory: Path
) -> AsyncIterator[RecorderService]:
    """One with the C library's symbols, and one without."""
    directory = debug_directory if request.param == "symbols" else "/nonexistent"
    with core_pattern_kept():
        service = RecorderService(recorder_debug_directory=directory)
        try:
            await service.start()
            yield service
        finally:
            service.close()


# For what does not depend on the C library.
by_one = pytest.mark.parametrize("recorder", ["symbols"], indirect=True)

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


@by_one
@pytest.mark.parametrize("options", [("-O2",), ("-O0", "-no-pie"), ("-O2", "-static")])
async def test_builds_of_the_same_bug_match(
    recorder: RecorderService, tmp_path: Path, options: tuple[str, ...]
) -> None:
    plain = await fingerprint_of(recorder, build(tmp_path / "one", "-O0"))
    built = await fingerprint_of(recorder, build(tmp_path / "two", *options), "7")

    assert plain == built


@by_one
async def test_place_of_memory_and_of_files_does_not_count(
    recorder: RecorderService, tmp_path: Path
) -> None:
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


@by_one
async def test_builds_of_the_same_bug_match_in_cpp(
    recorder: RecorderService, tmp_path: Path
) -> None:
    """Templates, lambdas, anonymous namespaces and virtual functions, with and without -g."""
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
    place = debug_place(debug_directory, program)
    place.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["objcopy", "--only-keep-debug", program, place], check=True)
    subprocess.run(["strip", "-o", bare, program], check=True)
    return bare


@by_one
@pytest.mark.parametrize("language", ["c", "c++"])
async def test_stripped_program_with_its_debug_file_matches(
    recorder: RecorderService, tmp_path: Path, debug_directory: Path, language: str
) -> None:
    if language == "c":
        program = build(tmp_path / "one", "-O2")
    else:
        program = build_cpp(tmp_path / "one", "-g", "-O2", "-DCONTENT=int")

    whole = await fingerprint_of(recorder, program)
    bare = await fingerprint_of(recorder, stripped(program, debug_directory))

    assert whole == bare


@by_one
async def test_stripped_program_is_known_by_its_build(
    recorder: RecorderService, tmp_path: Path
) -> None:
    """Without any name the same bug matches on each host, and another bug does not."""
    program = stripped(build_cpp(tmp_path / "x", "-O2", "-DCONTENT=int"), tmp_path / "away")
    moved = Path(shutil.copy(program, tmp_path))

    first, again = [await fingerprint_of(recorder, one) for one in (program, moved)]
    other = await fingerprint_of(recorder, program, "another class")

    assert first == again
    assert first != other


@by_one
async def test_stripped_program_is_linked_with_the_same_build_with_symbols(
    recorder: RecorderService, tmp_path: Path
) -> None:
    whole = build_cpp(tmp_path / "x", "-g", "-O2", "-DCONTENT=int")
    bare = stripped(whole, tmp_path / "away")
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


@by_one
async def test_another_bug_of_the_same_program_does_not_match(
    recorder: RecorderService, tmp_path: Path
) -> None:
    one = await fingerprint_of(recorder, build(tmp_path / "one", "-O0"))
    other = await fingerprint_of(recorder, build(tmp_path / "two", "-O0", bug="print"))

    assert one != other


_WAYS = """
#include <cassert>
#include <csignal>
#include <cstdlib>
#include <cstring>
static void *nothing;
static void quiet() noexcept { throw 1; }
static void again(int signal) { raise(signal); }
#define BUG(name) \\
    __attribute__((noinline)) void name(const char *way) { \\
        if (!strcmp(way, "abort")) abort(); \\
        if (!strcmp(way, "assert")) assert(!way); \\
        if (!strcmp(way, "throw")) throw 1; \\
        if (!strcmp(way, "noexcept")) quiet(); \\
        if (!strcmp(way, "free")) { void *held = malloc(8); free(held); free(held); } \\
        if (!strcmp(way, "again")) { \\
            struct sigaction act = {}; \\
            act.sa_handler = again, act.sa_flags = SA_NODEFER | SA_RESETHAND; \\
            sigaction(SIGSEGV, &act, nullptr), *(int *)nothing = 1; \\
        } \\
        if (!strcmp(way, "strlen")) exit(strlen((char *)nothing)); \\
        if (!strcmp(way, "memcpy")) memcpy(nothing, way, strlen(way)); \\
    }
BUG(one)
BUG(two)
int main(int, char **arguments) {
    if (*arguments[1] == '1') one(arguments[2]);
    two(arguments[2]);
}
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A program with the C library in a file of its own, and one with all in one."""
    need_program("g++")
    directory = tmp_path_factory.mktemp("ways")
    source, program, static = (directory / name / "program" for name in ("source", "is", "static"))
    for one in (source, program, static):
        one.parent.mkdir()
    source.write_text(_WAYS)
    options = ("-g", "-O0", "-fno-builtin", "-w", "-x", "c++", source)
    subprocess.run(["g++", *options, "-o", program], check=True)
    subprocess.run(["g++", *options, "-static", "-o", static], check=True)
    return program, static


async def frames_of(recorder: RecorderService, *command: str | Path) -> list[str]:
    """Return what the fingerprint was made of."""
    pid, _ = crash(*command, env=os.environ | {"GOTRACEBACK": "crash"})
    await recorder.captured(pid)
    found = json.loads(recorder.file(pid, "backtrace_json").read_bytes())
    return [str(name) for name in found["fingerprint_frames"]]


@pytest.mark.parametrize(
    ("way", "top"),
    [
        *(("abort", []), ("assert", []), ("throw", []), ("noexcept", ["quiet"]), ("again", [])),
        *(("free", ["libc.so"]), ("strlen", ["libc.so"]), ("memcpy", ["libc.so"])),
    ],
)
async def test_function_that_ended_it_is_told_with_symbols_of_the_c_library_and_without(
    recorder: RecorderService, programs: tuple[Path, Path], way: str, top: list[str]
) -> None:
    program, static = programs

    assert await frames_of(recorder, program, "1", way) == [*top, "one", "main"]
    assert await frames_of(recorder, program, "2", way) == [*top, "two", "main"]
    assert await frames_of(recorder, static, "1", way) == [*top, "one", "main"]


_RUST = """
#[inline(never)]
fn one(numbers: &[usize]) -> usize { numbers[numbers.len()] + 1 }
#[inline(never)]
fn two(numbers: &[usize]) -> usize { numbers.first().copied().unwrap() + 1 }
fn main() {
    let numbers: Vec<usize> = std::env::args().skip(2).map(|one| one.len()).collect();
    let first = std::env::args().len() == 2;
    println!("{}", if first { one(&numbers) } else { two(&numbers) });
}
"""


@pytest.fixture(scope="module")
def rust_programs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One bug, built in two ways."""
    if shutil.which("rustc") is None:
        pytest.skip("needs rustc")
    directory = tmp_path_factory.mktemp("rust")
    (directory / "bug.rs").write_text(_RUST)
    ways = {"plain": ["-g"], "fast": ["-O"]}
    for name, options in ways.items():
        output = ("-o", directory / name, directory / "bug.rs")
        subprocess.run(["rustc", "-C", "panic=abort", *options, *output], check=True)
    return [directory / name for name in ways]


async def test_function_that_panicked_in_rust_is_told(
    recorder: RecorderService, rust_programs: list[Path]
) -> None:
    for program in rust_programs:
        assert await frames_of(recorder, program, "x") == ["bug::one", "bug::main"]
        assert await frames_of(recorder, program) == ["bug::two", "bug::main"]


_GO = """
package main

import (
\t"os"
\t"runtime"
\t"sync"
)

//go:noinline
func one() { new(sync.Mutex).Unlock() }

//go:noinline
func two() { new(sync.Mutex).Unlock() }

//go:noinline
func work() {
\tif len(os.Args) > 1 {
\t\ttwo()
\t}
\tone()
}

func main() {
\truntime.LockOSThread() // so that it is another one that crashes
\tgo work()
\tselect {}
}
"""


@by_one
@pytest.mark.parametrize("compiler", go.COMPILERS)
async def test_function_that_go_ended_it_for_is_told(
    recorder: RecorderService, tmp_path: Path, compiler: str
) -> None:
    (tmp_path / "bug.go").write_text(_GO)
    program = go.build(compiler, tmp_path / "program", tmp_path / "bug.go")

    top, *one = await frames_of(recorder, program)
    same_top, *two = await frames_of(recorder, program, "two")

    assert top == same_top
    assert top.endswith("sync.Mutex.unlockSlow")
    assert (one[:2], two[:2]) == (["main.one", "main.work"], ["main.two", "main.work"])
