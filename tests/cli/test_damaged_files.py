"""What is damaged or forged at a destination is named, and nothing of it stays."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from crashbus.layout import Kind
from tests.cli.support import NO_BUS, MadeCrash, crashbus, get, make, names
from tests.support.disk import tmpfs
from tests.support.nats import NatsServer


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


def endless_empty(folder: Path, made: MadeCrash) -> None:
    frame = zstandard.compress(b"")
    (folder / made.file(Kind.CORE).stored_name).write_bytes(frame * 1_000_000)


def endless_skipped(folder: Path, made: MadeCrash) -> None:
    """Frames to be skipped, RFC 8878, 3.1.2, of 4 GiB each: a sparse file costs nothing."""
    with (folder / made.file(Kind.CORE).stored_name).open("wb") as core:
        for number in range(16):
            core.seek(number << 32)
            core.write(struct.pack("<II", 0x184D2A50, (1 << 32) - 8))
        core.truncate(16 << 32)


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
        (endless_empty, "goes on beyond 6065550 bytes of compressed data"),
        (endless_skipped, "goes on beyond 6065550 bytes of compressed data"),
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
    made = make(core=os.urandom(3_000_000))
    made.deliver(delivered)
    with tmpfs(tmp_path / "small", "size=1m") as small:
        got = await get(delivered, made.id, "core", "-o", str(small), cwd=tmp_path)
        assert got.status == 1
        assert "No space left on device; take another directory with -o" in got.err
        assert names(small) == []


async def test_hostile_manifests_harm_nothing(delivered: Path, tmp_path: Path) -> None:
    made = make()
    folder = made.deliver(delivered)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0]["name"] = "../../outside"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    got = await get(delivered, made.id, cwd=tmp_path)
    assert got.status == 1
    assert "is no manifest (1 faults)" in got.err
    listed = await crashbus("ls", "--from", delivered.as_uri(), env=NO_BUS)
    assert listed.status == 0
    assert "passed over: " in listed.err


async def test_a_manifest_of_another_crash_is_refused(delivered: Path, tmp_path: Path) -> None:
    made, other = make(1), make(2)
    folder = made.deliver(delivered)
    (folder / "manifest.json").write_text(other.manifest.model_dump_json())
    got = await get(delivered, made.id, cwd=tmp_path)
    assert got.status == 1
    assert f"is of crash {other.id}" in got.err
