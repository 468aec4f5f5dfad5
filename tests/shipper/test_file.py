"""Delivery to a directory."""

import errno
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from crashbus import Bus
from crashbus.destination import parse
from crashbus.layout import Kind, binary_name
from services.shipper.destinations.file import TEMPORARY, FileDeliverer, Upload
from tests.shipper.conftest import (
    MIB,
    Running,
    dead_letters,
    nothing_left,
    quick,
    receipts_of,
    send,
)
from tests.support.disk import tmpfs
from tests.support.wait import until

CONTENTS = {"info_1": b"PID: 1", "cfg_1": b"", "core_1": os.urandom(3 * MIB) + bytes(20 * MIB)}


def files_below(directory: Path) -> list[str]:
    return sorted(str(one.relative_to(directory)) for one in directory.rglob("*") if one.is_file())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    with tmpfs(tmp_path / "disk", "size=4m") as directory:
        yield directory


async def test_files_arrive_whole_under_their_names(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    base = tmp_path / "not" / "there yet"
    url = parse(base.as_uri()).url
    sent = await send(bus, CONTENTS)
    for name in CONTENTS:
        await bus.publish(sent.item(url, name))

    async with shipping([url]):
        receipts = await receipts_of(bus, sent, 3)
        await nothing_left(bus)

    assert files_below(base) == sorted(f"{sent.folder}/{name}.zst" for name in CONTENTS)
    for receipt in receipts:
        path = base / sent.folder / receipt.file.stored_name
        assert receipt.url == path.as_uri()
        with zstandard.open(path) as file:
            assert file.read() == CONTENTS[receipt.file.name]
        assert path.stat().st_size == receipt.file.stored_size
        assert path.stat().st_mode & 0o7 == 0, "core dumps are not for everyone"


async def test_binary_is_delivered_once_and_never_replaced_by_another(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    url = tmp_path.as_uri()
    folder = tmp_path / "build-id" / "ab" / ("ab" * 19)
    contents = [b"the first", b"of the same build, stripped", b"the first"]
    contents.append(contents[1])
    receipts, written = [], set()
    async with shipping([url]):
        for content in contents:
            name = binary_name(Kind.EXECUTABLE, "ab" * 20, hashlib.sha256(content).hexdigest())
            sent = await send(bus, {name: content}, encoding="identity")
            await bus.publish(sent.item(url))
            receipts += await receipts_of(bus, sent, 1)
            written |= {(path.name, path.stat().st_ino) for path in folder.iterdir()}
        await nothing_left(bus)

    other = f"executable-{hashlib.sha256(contents[1]).hexdigest()[:16]}"
    assert files_below(folder) == ["executable", other]
    assert (folder / "executable").read_bytes() == contents[0]
    assert len(written) == 2, "it was written again"
    assert (folder / other).read_bytes() == contents[1]
    assert [receipt.url.rpartition("/")[2] for receipt in receipts] == [
        *("executable", other, "executable", other)
    ]


def no_links(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")  # as FAT says it, link(2)


@pytest.mark.parametrize("has_links", [True, False])
async def test_binary_that_comes_while_another_is_delivered_is_not_replaced(
    bus: Bus, shipping: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    place = tmp_path / "build-id" / "ab" / ("ab" * 19) / "executable"
    looked = FileDeliverer.sha256_of

    async def looked_too_early(self: FileDeliverer, folder: str, name: str) -> str | None:
        found = await looked(self, folder, name)
        if found is None and name == place.name:
            place.write_bytes(b"of another shipper")
        return found

    monkeypatch.setattr(FileDeliverer, "sha256_of", looked_too_early)
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    name = binary_name(Kind.EXECUTABLE, "ab" * 20, hashlib.sha256(b"ours").hexdigest())
    sent = await send(bus, {name: b"ours"}, encoding="identity")
    await bus.publish(sent.item(tmp_path.as_uri()))

    async with shipping([tmp_path.as_uri()]):
        (receipt,) = await receipts_of(bus, sent, 1)

    delivered = place.parent / receipt.file.stored_name
    assert delivered.read_bytes() == b"ours"
    assert place.read_bytes() == b"of another shipper"
    assert set(files_below(place.parent)) == {place.name, delivered.name}


async def test_binary_gets_its_name_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    upload = Upload(str(tmp_path), "folder")
    try:
        upload.open()
        upload.write(b"ours")
        upload.take("executable")
    finally:
        upload.close()
    assert (tmp_path / "folder" / "executable").read_bytes() == b"ours"


@pytest.mark.parametrize("obstacle", ["link", "fifo", "directory"])
async def test_what_lies_where_a_binary_should_is_left_alone(
    bus: Bus, shipping: Running, tmp_path: Path, obstacle: str
) -> None:
    place = tmp_path / "build-id" / "ab" / ("ab" * 19) / "executable"
    place.parent.mkdir(parents=True)
    target = tmp_path / "target"
    target.write_text("precious")
    if obstacle == "link":
        place.symlink_to(target)
    elif obstacle == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir()
    name = binary_name(Kind.EXECUTABLE, "ab" * 20, hashlib.sha256(b"x").hexdigest())
    sent = await send(bus, {name: b"x"}, encoding="identity")
    await bus.publish(sent.item(tmp_path.as_uri()))

    async with shipping([tmp_path.as_uri()]):
        (receipt,) = await receipts_of(bus, sent, 1)

    assert receipt.file.stored_name.startswith("executable-")
    assert (place.parent / receipt.file.stored_name).read_bytes() == b"x"
    assert target.read_text() == "precious"


async def test_delivering_again_replaces_what_is_there(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    url = tmp_path.as_uri()
    sent = await send(bus, {"info_1": b"new"}, encoding="identity")
    target = tmp_path / sent.folder / "info_1"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"an old one that is longer")
    await bus.publish(sent.item(url))

    async with shipping([url]):
        await receipts_of(bus, sent, 1)

    assert target.read_bytes() == b"new"


async def test_full_disk_is_waited_for(bus: Bus, shipping: Running, small_disk: Path) -> None:
    base = small_disk / "crashes"
    hog = small_disk / "hog"
    hog.write_bytes(bytes(3 * MIB))
    sent = await send(bus, {"core_1": os.urandom(2 * MIB)}, encoding="identity")
    await bus.publish(sent.item(base.as_uri()))

    async with shipping([base.as_uri()], quick(retry_in_hand=0.2)) as health:
        faults = await until(health.faults)
        assert "No space left" in str(faults)
        assert "make room" in str(faults)
        hog.unlink()
        (receipt,) = await receipts_of(bus, sent, 1)

    assert receipt.attempts > 1
    assert files_below(base) == [f"{sent.folder}/core_1"]


async def test_full_disk_for_too_long_is_a_dead_letter_with_its_history(
    bus: Bus, shipping: Running, small_disk: Path
) -> None:
    url = small_disk.as_uri()
    sent = await send(bus, {"core_1": os.urandom(5 * MIB)}, encoding="identity")
    await bus.publish(sent.item(url))

    async with shipping([url], quick(retry_in_hand=0.2, give_up=1)):
        (letter,) = await dead_letters(bus)
        await nothing_left(bus)

    assert letter.reason == "disk_full"
    assert letter.attempts == len(letter.history) > 2
    assert files_below(small_disk) == []


async def test_read_only_destination_is_a_dead_letter_at_once(
    bus: Bus, shipping: Running, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(small_disk.as_uri()))

    async with shipping([small_disk.as_uri()]) as health:
        (letter,) = await dead_letters(bus)
        await nothing_left(bus)
        assert health.faults() == {}, "one failure is no standing fault"

    assert (letter.reason, letter.attempts) == ("read_only", 1)
    assert "writing" in letter.mend


async def test_symbolic_link_below_the_destination_is_not_followed(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    base, elsewhere = tmp_path / "base", tmp_path / "elsewhere"
    elsewhere.mkdir()
    base.mkdir()
    (base / "web1").symlink_to(elsewhere)
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(base.as_uri()))

    async with shipping([base.as_uri()]):
        (letter,) = await dead_letters(bus)

    assert letter.reason == "not_a_directory"
    assert list(elsewhere.iterdir()) == []


async def test_damaged_file_leaves_nothing(bus: Bus, shipping: Running, tmp_path: Path) -> None:
    sent = await send(bus, {"core_1": os.urandom(2 * MIB)})
    claimed = sent.files[0].model_copy(update={"size": 2 * MIB - 1})
    await bus.publish(sent.item(tmp_path.as_uri(), files=(claimed,)))

    async with shipping([tmp_path.as_uri()]):
        (letter,) = await dead_letters(bus)

    assert letter.reason == "damaged_file"
    assert [name for name in files_below(tmp_path) if sent.crash_id in name] == []


async def test_name_too_long_for_a_file_is_a_dead_letter(
    bus: Bus, shipping: Running, tmp_path: Path
) -> None:
    sent = await send(bus, {"info_1": b"x"})
    await bus.publish(sent.item(tmp_path.as_uri(), host="\N{SNOWMAN}" * 200))

    async with shipping([tmp_path.as_uri()]):
        (letter,) = await dead_letters(bus)

    assert letter.reason == "name_too_long"


def test_leftovers_of_killed_shippers_are_removed_and_of_living_ones_not(tmp_path: Path) -> None:
    abandoned = tmp_path / f"{TEMPORARY}0000"
    abandoned.write_bytes(b"half")
    os.mkfifo(tmp_path / f"{TEMPORARY}pipe")  # must not block either
    living, further = Upload(str(tmp_path), ""), Upload(str(tmp_path), "")
    living.open()
    living.write(b"whole")

    further.open()
    further.close()
    living.replace("name")
    living.close()

    assert files_below(tmp_path) == ["name"]
    assert (tmp_path / "name").read_bytes() == b"whole"
