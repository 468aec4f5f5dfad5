"""ls, show and get on a destination, with no bus at all."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from crashbus.cli.store import FileStore
from crashbus.layout import BINARIES, Kind
from crashbus.parts import Module
from tests.cli.support import NO_BUS, MadeCrash, Result, binary_of, crashbus, get, make, names
from tests.support.s3 import S3Server

Deliver = Callable[[MadeCrash], None]


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
    listed = await place.run("ls", "--from", place.url, "--json")
    rows = [json.loads(line) for line in listed.out.splitlines()]
    assert [row["crash_id"] for row in rows] == [made.id for made in reversed(crashes)]
    assert {row["state"] for row in rows} == {"delivered"}
    assert rows[1]["process"] == "a-b/c[2]"
    since = await place.run("ls", "--from", place.url, "--since", "2026-11-24", "--json")
    assert [json.loads(line)["crash_id"] for line in since.out.splitlines()] == [crashes[2].id]
    of_host = await place.run("ls", "--from", place.url, "--host", "a%b", "-n", "5")
    assert of_host.out.split("\n")[1].split()[2:5] == [crashes[0].id, "a%b", "nginx[1]"]


async def test_get_writes_what_crashed_byte_for_byte(place: Place, tmp_path: Path) -> None:
    made = make()
    place.deliver(made)
    got = await place.run("get", made.id[:5], "--from", place.url, "--json", cwd=tmp_path)
    assert got.status == 0, got.err
    told = [json.loads(line) for line in got.out.splitlines()]
    assert {(Path(one["path"]).name, one["sha256"]) for one in told} == {
        (file.name, file.sha256) for file in made.manifest.files
    }
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
    refused = await crashbus("ls", "--from", f"s3://{bucket}", env=wrong)
    assert refused.status == 1
    assert "SignatureDoesNotMatch" in refused.err
    assert "check CRASHBUS_SHIPPER_S3_ACCESS_KEY" in refused.err
    assert "not-this-one" not in refused.err
    missing = await crashbus("ls", "--from", "s3://no-such-bucket", env=s3.settings())
    assert missing.status == 1
    assert "NoSuchBucket" in missing.err
    gone = {**s3.settings(), "CRASHBUS_SHIPPER_S3_ENDPOINT": "http://127.0.0.1:1"}
    silent = await crashbus("ls", "--from", f"s3://{bucket}", env=gone)
    assert silent.status == 1
    assert "http://127.0.0.1:1 does not answer" in silent.err
    assert silent.err.count("\n") == 1


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


async def test_a_crash_on_its_way_is_listed_and_not_fetched(
    delivered: Path, tmp_path: Path
) -> None:
    made = make()
    (made.deliver(delivered) / "manifest.json").unlink()
    (delivered / "web.1" / "not-a-day" / "x").mkdir(parents=True)
    (delivered / "lost+found").mkdir()
    listed = await crashbus("ls", "--from", delivered.as_uri(), "--json", env=NO_BUS)
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
    listed = await crashbus("ls", "--from", url, env=NO_BUS)
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


async def test_binaries_are_counted_apart_from_a_crash_s_own_files(delivered: Path) -> None:
    made = make()
    (binary,) = Module(path="/x", build_id="ab" * 20, kept=(binary_of(b"x"),)).files()
    manifest = made.manifest.model_copy(update={"files": (*made.manifest.files, binary)})
    folder = made.deliver(delivered)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (delivered / BINARIES / "ab" / ("ab" * 19)).mkdir(parents=True)

    listed = await crashbus("ls", "--from", delivered.as_uri(), "--json", env=NO_BUS)
    shown = await crashbus("show", made.id, "--from", delivered.as_uri(), env=NO_BUS)
    got = await crashbus(
        "get", made.id, "--from", delivered.as_uri(), "-o", str(delivered / "got"), env=NO_BUS
    )

    (crash,) = [json.loads(line) for line in listed.out.splitlines()]
    assert crash["files"] == 3
    assert "and the first to bring 1 binaries, 1 B, below build-id/" in shown.out
    assert got.status == 0, got.err
    assert len(list((delivered / "got").iterdir())) == 3
