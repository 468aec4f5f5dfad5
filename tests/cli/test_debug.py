"""crashbus debug: gdb on a core, with the binaries that lie beside it."""

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from crashbus import elf
from crashbus.cli import sysroot
from crashbus.cli.sysroot import Sysroot
from crashbus.layout import BINARIES, Kind, binary_key
from crashbus.parts import Container, Module, Supplement
from tests.cli.support import NO_BUS, MadeCrash, binary_of, crashbus, make
from tests.support.lease import leased
from tests.support.packaged import lay_down, packaged
from tests.support.requirements import need_program, need_root

NULL_POINTER = """
int depth(int *p) { return *p; }
int main(void) { return depth(0); }
"""


@pytest.fixture(scope="session")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A program that reads a null pointer, and a core dump of it made by gdb."""
    directory = tmp_path_factory.mktemp("crashing")
    source, program, core = (directory / name for name in ("null.c", "null", "core"))
    source.write_text(NULL_POINTER)
    make_core(source, program, core)
    return program, core


def make_core(source: Path, program: Path, core: Path) -> None:
    compiler = "g++" if source.suffix == ".cc" else "gcc"
    need_program(compiler)
    subprocess.run([compiler, "-g", "-O0", "-o", program, source], check=True)
    dump_core(program, core)


def dump_core(program: Path, core: Path) -> None:
    need_program("gdb")
    script = ("run", f"generate-core-file {core}", "kill")
    arguments = [part for command in script for part in ("-ex", command)]
    subprocess.run(["gdb", "-batch", "-nx", *arguments, program], check=True, capture_output=True)
    assert core.exists()


async def test_debug_shows_the_crashing_line_in_gdb(
    crashing: tuple[Path, Path], delivered: Path
) -> None:
    program, core = crashing
    made = make(core=core.read_bytes(), executable=str(program))
    made.deliver(delivered)
    arguments = ("--from", delivered.as_uri(), "--", "-batch", "-nx", "-ex", "bt")
    debugged = await crashbus("debug", made.id, *arguments, env=NO_BUS)
    assert debugged.status == 0, debugged.err
    assert "depth (p=0x0)" in debugged.out
    assert "main () at" in debugged.out
    assert f"of which build {program} was is not known" in debugged.err


async def test_debug_without_the_executable_says_so_and_goes_on(
    crashing: tuple[Path, Path], delivered: Path, tmp_path: Path
) -> None:
    made = make(core=crashing[1].read_bytes(), executable="/not/\x1b[31mhere")
    made.deliver(delivered)
    arguments = ("-o", "kept", "--from", delivered.as_uri(), "--", "-batch", "-nx")
    debugged = await crashbus("debug", made.id, *arguments, env=NO_BUS, cwd=tmp_path)
    assert debugged.status == 0, debugged.err
    assert "the executable /not/\\x1b[31mhere is not on this host" in debugged.err
    kept = tmp_path / "kept" / made.file(Kind.CORE).name
    assert kept.read_bytes() == made.contents[kept.name]

    (delivered / made.manifest.folder / made.file(Kind.CORE).stored_name).unlink()
    again = await crashbus("debug", made.id, *arguments, env=NO_BUS, cwd=tmp_path)
    assert again.status == 0  # what was kept is used again
    kept.write_bytes(b"of another crash")
    again = await crashbus("debug", made.id, *arguments, env=NO_BUS, cwd=tmp_path)
    assert again.status == 1
    assert " exists; " in again.err
    assert kept.read_bytes() == b"of another crash"


def deliver(made: MadeCrash, delivered: Path, modules: Mapping[Module, bytes | None]) -> None:
    """Deliver a crash with what is kept of its modules."""
    told = tuple(
        module.model_copy(update={"kept": () if content is None else (binary_of(content),)})
        for module, content in modules.items()
    )
    folder = made.deliver(delivered)
    manifest = made.manifest.model_copy(update={"modules": told})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    for module, content in modules.items():
        if content is not None:
            place = delivered / BINARIES / module.build_id[:2] / module.build_id[2:]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"executable-{binary_of(content).sha256[:16]}").write_bytes(content)


async def test_binaries_lie_where_gdb_looks_for_them_and_are_those_that_were_mapped(
    crashing: tuple[Path, Path], delivered: Path, tmp_path: Path
) -> None:
    program, core = crashing
    forged = program.read_bytes() + b"of the same build ID"
    twin = tmp_path / "twin"
    name_it = ("-Wl,-soname,libtwin.so.1", "-Wl,--build-id=none")
    subprocess.run(["gcc", "-shared", "-o", twin, "-x", "c", "/dev/null", *name_it], check=True)
    system, bundled = twin.read_bytes(), twin.read_bytes() + b"bundled"
    library, own = "/usr/lib/x86_64-linux-gnu/libtwin.so.1.2.3", "/opt/app/lib/libtwin.so.1"
    made = make(core=core.read_bytes(), executable=str(program))
    modules = {
        Module(path=str(program), build_id=build_id_of(program)): forged,
        Module(path=own, build_id="01" * 20): bundled,
        Module(path=library, build_id="02" * 20): system,
        Module(path=f"{library} (deleted)", build_id="03" * 20): b"the one before",
        Module(path="/no/id", build_id="04" * 20, has_build_id=False): b"without",
    }
    deliver(made, delivered, modules)
    out = tmp_path / "out"
    arguments = ("-o", str(out), "--from", delivered.as_uri(), "--", "-batch", "-nx")

    debugged = await crashbus("debug", made.id, *arguments, "-ex", "bt", env=NO_BUS)

    assert "depth (p=0x0)" in debugged.out, debugged.err
    root, builds = out / "sysroot", out / "debug" / ".build-id"
    assert root.joinpath(*program.parts[1:]).read_bytes() == forged
    for name in ("libtwin.so.1", "libtwin.so.1.2.3"):
        for directory in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"):
            assert (root / directory / name).read_bytes() == system
    assert (root / own[1:]).read_bytes() == bundled
    assert f"{library} (deleted) of build {'03' * 20} is left out" in debugged.err
    assert (builds / "03" / ("03" * 19)).read_bytes() == b"the one before"
    assert (builds / "02" / ("02" * 19)).read_bytes() == system
    assert (root / "no" / "id").read_bytes() == b"without"
    assert not (builds / "04").exists()


async def test_debug_shows_no_other_build_in_place_of_one_that_is_missing(
    crashing: tuple[Path, Path], delivered: Path
) -> None:
    program, core = crashing
    made = make(core=core.read_bytes(), executable=str(program))
    deliver(made, delivered, {Module(path=str(program), build_id="cd" * 20): None})
    arguments = ("--from", delivered.as_uri(), "--", "-batch", "-nx", "-ex", "bt")

    debugged = await crashbus("debug", made.id, *arguments, env=NO_BUS)

    assert debugged.status == 0, debugged.err
    assert "depth" not in debugged.out
    assert f"{program} is missing: the crash's host did not keep it" in debugged.err
    assert f"the executable {program} is not there" in debugged.err


async def test_debug_shows_nothing_of_this_machine_for_a_container(
    crashing: tuple[Path, Path], delivered: Path
) -> None:
    program, core = crashing
    made = make(core=core.read_bytes(), executable=str(program))
    container = Container(id="ab" * 32, runtime="docker")
    process = made.manifest.process.model_copy(update={"container": container})
    (made.deliver(delivered) / "manifest.json").write_text(
        made.manifest.model_copy(update={"process": process}).model_dump_json()
    )
    arguments = ("--from", delivered.as_uri(), "--", "-batch", "-nx", "-ex", "bt")

    debugged = await crashbus("debug", made.id, *arguments, env=NO_BUS)

    assert debugged.status == 0, debugged.err
    assert "depth" not in debugged.out
    assert f"the executable {program} is not there" in debugged.err


async def test_debug_takes_the_binary_that_was_mapped_and_nothing_out_of_its_place(
    crashing: tuple[Path, Path], delivered: Path, tmp_path: Path
) -> None:
    program, core = crashing
    content, build_id = program.read_bytes(), "ab" * 20
    away, kept = tmp_path / "away", (binary_of(content),)
    made = make(core=core.read_bytes(), executable="/gone/program")
    modules = (
        Module(path="/gone/program", build_id=build_id, kept=kept),
        Module(path="/../../escaped", build_id=build_id, kept=kept),
        Module(path=f"/x/../../../{away}", build_id=build_id, kept=kept),
        Module(path="relative", build_id=build_id, kept=kept),
        Module(path="/gone/program/below-a-file", build_id=build_id, kept=kept),
        Module(path="/not/kept", build_id="cd" * 20),
    )
    manifest = made.manifest.model_copy(update={"modules": modules})
    folder = made.deliver(delivered)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    place = delivered / BINARIES / "ab" / ("ab" * 19)
    place.mkdir(parents=True)
    (place / "executable").write_bytes(b"a forged one, of the same build ID")
    (place / f"executable-{kept[0].sha256[:16]}").write_bytes(content)
    arguments = ("-o", str(tmp_path / "out"), "--from", delivered.as_uri())

    debugged = await crashbus(
        "debug", made.id, *arguments, "--", "-batch", "-nx", "-ex", "bt", env=NO_BUS
    )

    assert debugged.status == 0, debugged.err
    assert "depth (p=0x0)" in debugged.out
    assert (tmp_path / "out" / "sysroot" / "gone" / "program").read_bytes() == content
    assert not away.exists()
    assert not list(tmp_path.rglob("*escaped*"))
    for path in ("/../../escaped", "relative", "/gone/program/below-a-file", "/not/kept"):
        assert f"{path} is missing: " in debugged.err


async def test_debug_information_and_what_it_refers_to_are_at_hand(
    delivered: Path, tmp_path: Path
) -> None:
    files, core = packaged(tmp_path / "made"), tmp_path / "core"
    dump_core(files.program, core)
    debug = binary_of(files.debug.read_bytes(), Kind.DEBUGINFO)
    common = binary_of(files.common.read_bytes(), Kind.DEBUGINFO)
    module = Module(
        path="/gone/program",
        build_id=files.build_id,
        kept=(binary_of(files.program.read_bytes()), debug),
        supplement=Supplement(build_id=files.common_id, kept=common),
    )
    made = make(core=core.read_bytes(), executable="/gone/program")
    folder = made.deliver(delivered)
    manifest = made.manifest.model_copy(update={"modules": (module,)})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    for key, file in (
        (binary_key(Kind.EXECUTABLE, files.build_id), files.program),
        (binary_key(Kind.DEBUGINFO, files.build_id), files.debug),
        (binary_key(Kind.DEBUGINFO, files.common_id), files.common),
    ):
        lay_down(file, delivered / key)

    arguments = ("--from", delivered.as_uri(), "--", "-batch", "-nx", "-ex", "bt")
    debugged = await crashbus("debug", made.id, *arguments, env=NO_BUS)

    assert debugged.status == 0, debugged.err
    assert "crash_here (at=0x0) at" in debugged.out


SCRIPT = """
__asm__(".pushsection .debug_gdb_scripts, \\"MS\\", @progbits, 1\\n"
        ".byte 4\\n.ascii \\"script\\\\nopen('{0}/embedded', 'w')\\\\n\\"\\n.byte 0\\n"
        ".byte 1\\n.asciz \\"{0}/named.py\\"\\n"
        ".byte 1\\n.asciz \\"/usr/share/gdb/auto-load/../../../..{0}/named.py\\"\\n"
        ".popsection\\n");
"""


async def test_gdb_runs_no_script_that_came_with_the_binaries_or_lies_beside_them(
    delivered: Path, tmp_path: Path
) -> None:
    source, program, core = (tmp_path / name for name in ("null.c", "null", "core"))
    source.write_text(NULL_POINTER + SCRIPT.format(tmp_path))
    (tmp_path / "named.py").write_text(f"open('{tmp_path}/by-name', 'w')")
    make_core(source, program, core)
    beside = {
        "-gdb.gdb": f"shell touch {tmp_path}/beside".encode(),
        "-gdb.py": f"open('{tmp_path}/beside', 'w')".encode(),
    }
    kept = {"/gone/program": program.read_bytes()}
    for ending, script in beside.items():
        kept[f"/gone/program{ending}"] = script
        program.with_name(f"{program.name}{ending}").write_bytes(script)
    made = make(core=core.read_bytes(), executable="/gone/program")
    build_ids = ("ab" * 20, "cd" * 20, "ef" * 20)
    modules = zip(kept.items(), build_ids, strict=True)
    deliver(made, delivered, {Module(path=p, build_id=b): content for (p, content), b in modules})
    here = make(4712, core=core.read_bytes(), executable=str(program))
    here.deliver(delivered)
    home = tmp_path / "home"
    home.mkdir()
    trusting = "set auto-load safe-path /\nset auto-load scripts-directory /\n"  # many do
    (home / ".gdbinit").write_text(trusting)
    (tmp_path / ".gdbinit").write_text(f"shell touch {tmp_path}/local\n")
    env = {**NO_BUS, "HOME": str(home), "XDG_CONFIG_HOME": str(home)}

    arguments = ("--from", delivered.as_uri(), "--", "-batch", "-ex", "bt")
    kept_here = ("-o", str(tmp_path / "out"))
    debugged = await crashbus("debug", made.id, *kept_here, *arguments, env=env, cwd=tmp_path)
    of_this_machine = await crashbus("debug", here.id, *arguments, env=env, cwd=tmp_path)

    for shown in (debugged, of_this_machine):
        assert shown.status == 0, shown.err
        assert "depth (p=0x0)" in shown.out
    assert (tmp_path / "out/sysroot/gone/program-gdb.gdb").exists()
    assert (tmp_path / "out/sysroot/gone/program-gdb.py").exists()
    for made_by in ("embedded", "by-name", "beside", "local"):
        assert not (tmp_path / made_by).exists(), made_by


def build_id_of(path: Path) -> str:
    with path.open("rb") as file:
        found = elf.build_id(file.fileno())
    assert found is not None
    return found


CONTAINER = """
#include <string>
#include <vector>
int crash(std::vector<std::string> &held, int *p) { return *p + held.size(); }
int main() { std::vector<std::string> held{"alpha", "beta"}; return crash(held, nullptr); }
"""


async def test_gdb_shows_what_a_container_holds_by_its_own_scripts(
    delivered: Path, tmp_path: Path
) -> None:
    source, program, core = (tmp_path / name for name in ("held.cc", "held", "core"))
    source.write_text(CONTAINER)
    make_core(source, program, core)
    loaded = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    library = Path(loaded.partition("libstdc++.so.6 => ")[2].split()[0]).resolve()
    modules = tuple(Module(path=str(one), build_id=build_id_of(one)) for one in (program, library))
    made = make(core=core.read_bytes(), executable=str(program))
    folder = made.deliver(delivered)
    manifest = made.manifest.model_copy(update={"modules": modules})
    (folder / "manifest.json").write_text(manifest.model_dump_json())

    arguments = ("--from", delivered.as_uri(), "--", "-batch", "-nx", "-ex", "print held")
    debugged = await crashbus("debug", made.id, *arguments, env=NO_BUS)

    assert 'std::vector of length 2, capacity 2 = {"alpha", "beta"}' in debugged.out, debugged.err


async def test_debug_opens_nothing_of_this_machine_but_files(
    crashing: tuple[Path, Path], delivered: Path, tmp_path: Path
) -> None:
    fifo = tmp_path / "as-a-device-it-acts-when-opened"
    os.mkfifo(fifo)
    writer = subprocess.Popen(["sh", "-c", f"echo > '{fifo}'"])  # waits until somebody opens it
    try:
        made = make(core=crashing[1].read_bytes())
        module = Module(path=str(fifo), build_id="ab" * 20)
        manifest = made.manifest.model_copy(update={"modules": (module,)})
        folder = made.deliver(delivered)
        (folder / "manifest.json").write_text(manifest.model_dump_json())
        arguments = ("--from", delivered.as_uri(), "--", "-batch", "-nx")
        debugged = await crashbus("debug", made.id, *arguments, env=NO_BUS)
        assert f"{fifo} is missing: " in debugged.err
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()


NAMES_A_DEVICE = """
#include <link.h>
int main(void) {{
    struct link_map *library = _r_debug.r_map->l_next->l_next;
    library->l_name = "{out}/dev/full";
    library->l_next->l_name = "{out}/proc/{pid}/root/dev/full";
    return *(volatile int *) 0;
}}
"""


async def test_gdb_opens_no_device_that_the_process_named_as_a_library(
    delivered: Path, tmp_path: Path
) -> None:
    need_root()
    source, program, core = (tmp_path / name for name in ("named.c", "named", "core"))
    source.write_text(NAMES_A_DEVICE.format(out="/.." * 20, pid=os.getpid()))
    make_core(source, program, core)
    made = make(core=core.read_bytes(), executable=str(program))
    deliver(made, delivered, {Module(path=str(program), build_id=build_id_of(program)): None})
    libc = ctypes.CDLL(None)
    seen = libc.inotify_init1(os.O_NONBLOCK)  # inotify(7)
    libc.inotify_add_watch(seen, b"/dev/full", 0x20)  # IN_OPEN
    try:
        arguments = ("--from", delivered.as_uri(), "--", "-batch", "-nx", "-ex", "info shared")
        debugged = await crashbus("debug", made.id, *arguments, env=NO_BUS)

        for device in ("../dev/full", f"/{os.getpid()}/root/dev/full"):
            assert device in debugged.out, debugged.err
        with pytest.raises(BlockingIOError):
            os.read(seen, 4096)
    finally:
        os.close(seen)


def test_file_with_a_lease_is_not_waited_for(crashing: tuple[Path, Path], tmp_path: Path) -> None:
    own = Path(shutil.copy(crashing[0], tmp_path / "program"))
    module = Module(path=str(own), build_id=build_id_of(own))
    started = time.monotonic()
    with leased(own):
        assert not sysroot._is_same(own, module, None)
        assert sysroot._soname(own) is None
    # fcntl(2): the kernel would have broken the lease after lease-break-time, 45 s.
    assert time.monotonic() - started < 20
    assert sysroot._is_same(own, module, None)


def test_links_of_before_lead_to_what_the_crash_had_when_this_machine_has_changed(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "out"
    own, other, fetched = tmp_path / "own", tmp_path / "other", directory / "binaries" / "own"
    fetched.parent.mkdir(parents=True)
    own.write_bytes(b"of the crash")
    place = directory / "sysroot" / "own"
    assert sysroot._link(Sysroot(directory), own, place)
    fetched.write_bytes(own.read_bytes())
    own.write_bytes(b"upgraded")
    other.write_bytes(b"upgraded")

    again = Sysroot(directory)

    assert sysroot._link(again, fetched, place)
    assert place.read_bytes() == b"of the crash"
    assert not sysroot._link(again, other, place)  # the first has it
    assert sysroot._link(again, other, place.with_name("lib"))
    assert not sysroot._link(again, fetched, place.with_name("lib"))
    own.write_bytes(b"of the crash")  # the upgrade was taken back
    assert sysroot._link(Sysroot(directory), own, place)


async def test_debug_of_a_crash_without_core(delivered: Path) -> None:
    made = make()
    files = tuple(file for file in made.manifest.files if file.kind is not Kind.CORE)
    folder = made.deliver(delivered)
    coreless = made.manifest.model_copy(update={"files": files})
    (folder / "manifest.json").write_text(coreless.model_dump_json())
    debugged = await crashbus("debug", made.id, "--from", delivered.as_uri(), env=NO_BUS)
    assert debugged.status == 1
    assert "has no file 'core'; it has info_" in debugged.err


async def test_debug_without_gdb_says_so(delivered: Path) -> None:
    made = make()
    made.deliver(delivered)
    env = {**NO_BUS, "PATH": str(delivered)}
    debugged = await crashbus("debug", made.id, "--from", delivered.as_uri(), env=env)
    assert debugged.status == 1
    assert debugged.err == "crashbus: gdb is not installed here; apt-get install gdb\n"
    assert shutil.which("gdb")
