"""ls, show, get and debug on a destination, with no bus at all."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zstandard

from crashbus.cli.store import FileStore
from crashbus.layout import BINARIES, Kind
from crashbus.parts import Binary, Module
from tests.cli.support import MadeCrash, Result, crashbus, make
from tests.support.nats import NatsServer
from tests.support.requirements import need_program, need_root
from tests.support.s3 import S3Server

Deliver = Callable[[MadeCrash], None]
Run = Callable[..., Awaitable[Result]]
NO_BUS = {"CRASHBUS_NATS_URL": "nats://127.0.0.1:1"}


class Place:
    """A destination that holds what it is given, and how to read it."""

    def __init__(self, url: str, deliver: Deliver, settings: dict[str, str]) -> None:
        self.url = url
        self.deliver = deliver
        self.settings = {**NO_BUS, **settings}

    async def run(self, *arguments: str, cwd: Path | None = None) -> Result:
        return await crashbus(*arguments, env=self.settings, cwd=cwd)


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    directory = tmp_path / "delivered with space"
    if request.param == "file":
        directory.mkdir()
        return Place(directory.as_uri(), lambda made: void(made.deliver(directory)), {})
    s3: S3Server = request.getfixturevalue("s3")
    bucket = s3.make_bucket()

    def deliver(made: MadeCrash) -> None:
        folder = made.deliver(directory)
        for file in folder.iterdir():
            key = f"eu/crashes/{made.manifest.folder}/{file.name}"
            s3.client().fput_object(bucket, key, str(file))

    return Place(f"s3://{bucket}/eu/crashes", deliver, s3.settings())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def void(_: object) -> None:
    """Make an expression a statement."""


async def test_ls_reads_the_destination_newest_first(place: Place) -> None:
    crashes = [
        make(1, host="a%b", crashed_at=1795393639),
        make(2, host="web.1", crashed_at=1795393640, name="a-b/c"),
        make(3, host="web.1", crashed_at=1795393639 + 86400),
    ]
    for made in crashes:
        place.deliver(made)
    listed = await place.run("ls", "--dest", place.url, "--json")
    rows = [json.loads(line) for line in listed.out.splitlines()]
    assert [row["crash_id"] for row in rows] == [made.id for made in reversed(crashes)]
    assert {row["state"] for row in rows} == {"delivered"}
    assert rows[1]["process"] == "a-b/c[2]"
    of_host = await place.run("ls", "--dest", place.url, "--host", "a%b", "-n", "5")
    assert of_host.out.split("\n")[1].split()[2:5] == [crashes[0].id, "a%b", "nginx[1]"]


async def test_get_writes_what_crashed_byte_for_byte(place: Place, tmp_path: Path) -> None:
    made = make()
    place.deliver(made)
    got = await place.run("get", made.id[:5], "--from", place.url, cwd=tmp_path)
    assert got.status == 0, got.err
    for name, data in made.contents.items():
        assert (tmp_path / made.id / name).read_bytes() == data
    assert names(tmp_path / made.id) == sorted(made.contents)
    core = (tmp_path / made.id / made.file(Kind.CORE).name).stat()
    assert stat.S_IMODE(core.st_mode) == 0o600
    assert core.st_blocks * 512 < core.st_size  # zero runs are holes


async def test_show_reads_manifest_and_backtrace_there(place: Place) -> None:
    made = make()
    place.deliver(made)
    shown = await place.run("show", made.id, "--from", place.url)
    assert shown.status == 0, shown.err
    assert "#0 main + 4" in shown.out
    stored = f"{made.manifest.folder}/{made.file(Kind.CORE).stored_name}"
    assert f"{place.url}/{stored}" in shown.out


async def test_an_id_that_is_not_there(place: Place) -> None:
    place.deliver(make())
    got = await place.run("get", "0000", "--from", place.url)
    assert got.status == 1
    assert got.err.startswith(f"crashbus: no crash '0000' at {place.url}; ")


async def test_wrong_keys_and_missing_bucket_are_named(s3: S3Server) -> None:
    bucket = s3.make_bucket()
    wrong = {**s3.settings(), "CRASHBUS_SHIPPER_S3_SECRET_KEY": "not-this-one"}
    refused = await crashbus("ls", "--dest", f"s3://{bucket}", env=wrong)
    assert refused.status == 1
    assert "SignatureDoesNotMatch" in refused.err
    assert "check CRASHBUS_SHIPPER_S3_ACCESS_KEY" in refused.err
    assert "not-this-one" not in refused.err
    missing = await crashbus("ls", "--dest", "s3://no-such-bucket", env=s3.settings())
    assert missing.status == 1
    assert "NoSuchBucket" in missing.err
    gone = {**s3.settings(), "CRASHBUS_SHIPPER_S3_ENDPOINT": "http://127.0.0.1:1"}
    silent = await crashbus("ls", "--dest", f"s3://{bucket}", env=gone)
    assert silent.status == 1
    assert "http://127.0.0.1:1 does not answer" in silent.err
    assert silent.err.count("\n") == 1


@pytest.fixture
def delivered(tmp_path: Path) -> Path:
    directory = tmp_path / "delivered"
    directory.mkdir()
    return directory


async def get(directory: Path, *arguments: str, cwd: Path) -> Result:
    return await crashbus("get", *arguments, "--from", directory.as_uri(), env=NO_BUS, cwd=cwd)


async def test_get_takes_names_and_kinds(delivered: Path, tmp_path: Path) -> None:
    made = make()
    made.deliver(delivered)
    info = made.file(Kind.INFO).name
    got = await get(delivered, made.id, "backtrace", info, "-o", "here", cwd=tmp_path)
    assert got.status == 0, got.err
    assert names(tmp_path / "here") == [made.file(Kind.BACKTRACE).name, info]
    unknown = await get(delivered, made.id, "cfg", cwd=tmp_path)
    assert unknown.status == 1
    assert "has no file 'cfg'; it has info_" in unknown.err


async def test_get_overwrites_only_when_told_to(delivered: Path, tmp_path: Path) -> None:
    made = make()
    made.deliver(delivered)
    info = tmp_path / made.id / made.file(Kind.INFO).name
    info.parent.mkdir()
    info.write_text("mine")
    refused = await get(delivered, made.id, cwd=tmp_path)
    assert refused.status == 1
    assert names(info.parent) == [info.name]  # and nothing else was fetched before
    assert refused.err.endswith(" exists; take another directory with -o, or --force\n")
    assert info.read_text() == "mine"
    forced = await get(delivered, made.id, "info", "--force", cwd=tmp_path)
    assert forced.status == 0
    assert info.read_bytes() == made.contents[info.name]


async def test_get_replaces_a_link_and_not_what_it_points_to(
    delivered: Path, tmp_path: Path
) -> None:
    made = make()
    made.deliver(delivered)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    link = tmp_path / made.id / made.file(Kind.INFO).name
    link.parent.mkdir()
    link.symlink_to(precious)
    assert (await get(delivered, made.id, "info", cwd=tmp_path)).status == 1
    assert (await get(delivered, made.id, "info", "--force", cwd=tmp_path)).status == 0
    assert precious.read_text() == "mine"
    assert not link.is_symlink()


def flip(folder: Path, made: MadeCrash) -> None:
    core = folder / made.file(Kind.CORE).stored_name
    data = bytearray(core.read_bytes())
    data[len(data) // 2] ^= 1
    core.write_bytes(data)


def cut(folder: Path, made: MadeCrash) -> None:
    core = folder / made.file(Kind.CORE).stored_name
    core.write_bytes(core.read_bytes()[:-10])


def other_core(folder: Path, made: MadeCrash) -> None:
    other = bytearray(made.contents[made.file(Kind.CORE).name])
    other[-1] ^= 1
    stored = zstandard.compress(bytes(other))
    (folder / made.file(Kind.CORE).stored_name).write_bytes(stored)


def endless(folder: Path, made: MadeCrash) -> None:
    """A few kilobytes that decompress to far more than was announced."""
    frame = zstandard.compress(bytes(4_000_000))
    (folder / made.file(Kind.CORE).stored_name).write_bytes(frame * 1000)


def huge_window(folder: Path, made: MadeCrash) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = made.contents[made.file(Kind.CORE).name]
    stored = compressor.compress(data) + compressor.flush()
    (folder / made.file(Kind.CORE).stored_name).write_bytes(stored)


def link(folder: Path, made: MadeCrash) -> None:
    core = folder / made.file(Kind.CORE).stored_name
    core.unlink()
    core.symlink_to("/etc/passwd")


def pipe(folder: Path, made: MadeCrash) -> None:
    core = folder / made.file(Kind.CORE).stored_name
    core.unlink()
    os.mkfifo(core)


def gone(folder: Path, made: MadeCrash) -> None:
    (folder / made.file(Kind.CORE).stored_name).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "is not"),
        (cut, "bytes, the manifest says 3000007"),
        (other_core, "has SHA-256"),
        (endless, "is larger than the 3000007 bytes announced"),
        (huge_window, "is not valid zstd"),
        (link, "cannot read"),
        (pipe, "is no regular file"),
        (gone, "has no web.1/"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
async def test_a_damaged_file_is_named_and_leaves_nothing(
    damage: Callable[[Path, MadeCrash], None], said: str, delivered: Path, tmp_path: Path
) -> None:
    made = make()
    damage(made.deliver(delivered), made)
    got = await get(delivered, made.id, "core", cwd=tmp_path)
    assert got.status == 1
    assert said in got.err
    assert got.err.count("\n") == 1
    assert names(tmp_path / made.id) == []


async def test_a_damaged_copy_is_passed_over_for_a_good_one(
    nats_server: NatsServer, bus: object, tmp_path: Path
) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    made = make(destinations=(bad.as_uri(), "tcp://127.0.0.1:9", good.as_uri()))
    flip(made.deliver(bad), made)
    made.deliver(good)
    await made.publish(bus)  # type: ignore[arg-type]
    env = {"CRASHBUS_NATS_URL": nats_server.url}
    got = await crashbus("get", made.id, "core", env=env, cwd=tmp_path)
    assert got.status == 0, got.err
    core = made.file(Kind.CORE).name
    assert (tmp_path / made.id / core).read_bytes() == made.contents[core]


async def test_a_disk_that_fills_is_named_and_leaves_nothing(
    delivered: Path, tmp_path: Path
) -> None:
    need_root()  # for mount
    made = make(core=os.urandom(3_000_000))
    made.deliver(delivered)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(small)], check=True)
    try:
        got = await get(delivered, made.id, "core", "-o", str(small), cwd=tmp_path)
        assert got.status == 1
        assert "No space left on device; take another directory with -o" in got.err
        assert names(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


async def test_hostile_manifests_harm_nothing(delivered: Path, tmp_path: Path) -> None:
    made = make()
    folder = made.deliver(delivered)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0]["name"] = "../../outside"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    got = await get(delivered, made.id, cwd=tmp_path)
    assert got.status == 1
    assert "is no manifest (1 faults)" in got.err
    listed = await crashbus("ls", "--dest", delivered.as_uri(), env=NO_BUS)
    assert listed.status == 0
    assert "passed over: " in listed.err


async def test_a_manifest_of_another_crash_is_refused(delivered: Path, tmp_path: Path) -> None:
    made, other = make(1), make(2)
    folder = made.deliver(delivered)
    (folder / "manifest.json").write_text(other.manifest.model_dump_json())
    got = await get(delivered, made.id, cwd=tmp_path)
    assert got.status == 1
    assert f"is of crash {other.id}" in got.err


async def test_a_crash_on_its_way_is_listed_and_not_fetched(
    delivered: Path, tmp_path: Path
) -> None:
    made = make()
    (made.deliver(delivered) / "manifest.json").unlink()
    (delivered / "web.1" / "not-a-day" / "x").mkdir(parents=True)
    (delivered / "lost+found").mkdir()
    listed = await crashbus("ls", "--dest", delivered.as_uri(), "--json", env=NO_BUS)
    row = json.loads(listed.out)
    assert (row["crash_id"], row["state"], row["host"], row["process"]) == (
        *(made.id, "delivering"),
        *("web.1", "nginx"),
    )
    got = await get(delivered, made.id, cwd=tmp_path)
    assert got.status == 1
    assert "has no manifest yet; wait" in got.err


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:9", "ftp://x/y", "file:///no/such/place"])
async def test_urls_that_cannot_be_read(url: str) -> None:
    listed = await crashbus("ls", "--dest", url, env=NO_BUS)
    assert listed.status == 1
    assert listed.err.startswith("crashbus: ")
    assert listed.err.count("\n") == 1


def test_listing_asks_for_no_more_days_than_it_shows(delivered: Path) -> None:
    for day in range(5):
        make(day + 1, crashed_at=1795393639 + 86400 * day).deliver(delivered)
    asked: list[str] = []

    class Watched(FileStore):
        def _folders(self, below: str) -> list[str]:
            asked.append(below)
            return super()._folders(below)

    newest = next(Watched("file:///x", delivered).places())
    assert newest.crash_id == make(5).id
    assert len(asked) == 3  # hosts, days of the one host, crashes of the last day


NULL_POINTER = """
int depth(int *p) { return *p; }
int main(void) { return depth(0); }
"""


@pytest.fixture(scope="session")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A program that reads a null pointer, and a core dump of it made by gdb."""
    need_program("gcc")
    need_program("gdb")
    directory = tmp_path_factory.mktemp("crashing")
    source, program, core = (directory / name for name in ("null.c", "null", "core"))
    source.write_text(NULL_POINTER)
    subprocess.run(["gcc", "-g", "-O0", "-o", program, source], check=True)
    script = ("run", f"generate-core-file {core}", "kill")
    arguments = [part for command in script for part in ("-ex", command)]
    subprocess.run(["gdb", "-batch", "-nx", *arguments, program], check=True, capture_output=True)
    assert core.exists()
    return program, core


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


def binary_of(content: bytes) -> Binary:
    digest = hashlib.sha256(content).hexdigest()
    return Binary(kind=Kind.EXECUTABLE, size=len(content), sha256=digest)


async def test_binaries_are_counted_apart_from_a_crash_s_own_files(delivered: Path) -> None:
    made = make()
    (binary,) = Module(path="/x", build_id="ab" * 20, kept=(binary_of(b"x"),)).files()
    manifest = made.manifest.model_copy(update={"files": (*made.manifest.files, binary)})
    folder = made.deliver(delivered)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (delivered / BINARIES / "ab" / ("ab" * 19)).mkdir(parents=True)

    listed = await crashbus("ls", "--dest", delivered.as_uri(), "--json", env=NO_BUS)
    shown = await crashbus("show", made.id, "--from", delivered.as_uri(), env=NO_BUS)
    got = await crashbus(
        "get", made.id, "--from", delivered.as_uri(), "-o", str(delivered / "got"), env=NO_BUS
    )

    (crash,) = [json.loads(line) for line in listed.out.splitlines()]
    assert crash["files"] == 3
    assert "and the first to bring 1 binaries, 1 B, below build-id/" in shown.out
    assert got.status == 0, got.err
    assert len(list((delivered / "got").iterdir())) == 3


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
