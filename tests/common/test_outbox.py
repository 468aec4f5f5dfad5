"""The outbox: nothing taken in is lost, whatever happens to the process or the disk."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common import outbox as module
from services.common.outbox import Outbox, Outgoing
from tests.support.disk import tmpfs
from tests.support.wait import until


def messages(*bodies: str, expendable: bool = False) -> list[Outgoing]:
    return [Outgoing("crash.x", one.encode(), f"id-{one}", expendable) for one in bodies]


def bodies(outbox: Outbox) -> list[str]:
    return [one.payload.decode() for one in outbox.oldest(1_000_000)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "outbox.sqlite"


def test_oldest_come_first_and_go_when_removed(path: Path) -> None:
    outbox = Outbox(path, 100, 10_000)
    outbox.put(messages("a", "b"))
    outbox.put(messages("c"))
    assert [one.message_id for one in outbox.oldest(2)] == ["id-a", "id-b"]
    outbox.remove(outbox.oldest(1))
    assert bodies(outbox) == ["b", "c"]
    assert outbox.usage() == (2, 2)


def test_content_outlives_a_restart(path: Path) -> None:
    first = Outbox(path, 100, 10_000)
    first.put(messages("a", "b", "c"))
    first.remove(first.oldest(1))
    first.close()
    second = Outbox(path, 100, 10_000)
    assert bodies(second) == ["b", "c"]
    assert second.usage() == (2, 2)


def test_every_message_taken_in_outlives_sigkill(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from services.common.outbox import Outbox, Outgoing\n"
        "box = Outbox(Path(sys.argv[1]), 10**6, 10**9)\n"
        "for n in range(10**6):\n"
        "    box.put([Outgoing('s', b'%d' % n)]); print(n, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    for _ in range(200):
        writer.stdout.readline()
    os.kill(writer.pid, signal.SIGKILL)
    rest, _ = writer.communicate()
    taken = 200 + len([line for line in rest.split(b"\n")[:-1] if line])
    found = bodies(Outbox(path, 10**6, 10**9))
    assert found[:taken] == [str(n) for n in range(taken)]


def test_what_does_not_fit_is_counted_over_restarts(path: Path) -> None:
    outbox = Outbox(path, 2, 10_000)
    outbox.put(messages("a", "b", "c", "d"))
    assert bodies(outbox) == ["a", "b"]
    assert (outbox.lost(), outbox.lost_total, outbox.fullness()) == (2, 2, 1.0)
    outbox.close()
    outbox = Outbox(path, 2, 10_000)
    assert outbox.lost() == 2
    outbox.told_of_lost(2)
    outbox.close()
    assert Outbox(path, 2, 10_000).lost() == 0


def test_bytes_are_bounded_too(path: Path) -> None:
    outbox = Outbox(path, 100, 10)
    outbox.put(messages("123456", "12345", "1234"))
    assert bodies(outbox) == ["123456", "1234"]


def test_room_is_kept_for_what_must_not_be_lost(path: Path) -> None:
    outbox = Outbox(path, 10, 10_000)
    outbox.put(messages(*"abcdefghij", expendable=True))
    assert bodies(outbox) == list("abcdefgh")
    outbox.put(messages("death"))
    assert bodies(outbox)[-1] == "death"


def test_damaged_database_is_kept_aside_and_work_goes_on(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database at all" * 1000)
    outbox = Outbox(path, 100, 10_000)
    outbox.put(messages("a"))
    assert bodies(outbox) == ["a"]
    assert outbox.corrupted_total == 1
    assert path.with_name("outbox.sqlite.corrupt").read_bytes().startswith(b"no database")
    assert outbox.fault is None


def test_damage_inside_of_the_database_is_found(path: Path) -> None:
    outbox = Outbox(path, 10_000, 10_000_000)
    outbox.put(messages(*(f"{n:0500}" for n in range(500))))
    outbox.close()
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(os.urandom(4096 * 20))
    outbox = Outbox(path, 10_000, 10_000_000)
    outbox.put(messages("a"))
    assert bodies(outbox) == ["a"]
    assert outbox.corrupted_total == 1


def test_second_user_of_the_same_outbox_works_from_memory(path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "_BUSY", 0.01)
    first = Outbox(path, 100, 10_000)
    first.put(messages("a"))
    second = Outbox(path, 100, 10_000)
    second.put(messages("b"))
    assert bodies(second) == ["b"]
    assert second.fault is not None
    assert "locked" in second.fault
    assert bodies(first) == ["a"]


def test_memory_is_bounded_while_the_disk_refuses(path: Path) -> None:
    path.parent.mkdir()
    path.mkdir()  # where the database should be
    outbox = Outbox(path, 100, 10_000, memory_bytes=3)
    outbox.put(messages("a", "b", "c", "d"))
    assert bodies(outbox) == ["a", "b", "c"]
    assert outbox.lost() == 1
    outbox.remove(outbox.oldest(1))
    assert bodies(outbox) == ["b", "c"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path / "disk", "size=256k") as place:
        yield place


def fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))


async def test_full_disk_loses_nothing(small_disk: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "RETRY_DISK", 0.05)
    outbox = Outbox(small_disk / "outbox.sqlite", 10_000, 10_000_000)
    outbox.put(messages("first"))
    filler = small_disk / "filler"
    fill(filler)
    expected = ["first", *(f"{n:02}" + "x" * 2000 for n in range(40))]
    outbox.put(messages(*expected[1:]))
    assert outbox.fault is not None
    assert "full" in outbox.fault
    assert bodies(outbox) == expected

    outbox.remove(outbox.oldest(1))  # published; the disk has no room even to forget it
    assert bodies(outbox) == expected[1:]

    filler.unlink()

    def is_on_disk() -> bool:
        outbox.oldest(1)
        return outbox.fault is None

    await until(is_on_disk)
    outbox.close()
    again = Outbox(small_disk / "outbox.sqlite", 10_000, 10_000_000)
    assert bodies(again) == expected[1:]
    again.close()


def test_puts_are_quick(path: Path) -> None:
    outbox = Outbox(path, 10**6, 10**9)
    before = time.process_time()
    for n in range(500):
        outbox.put(messages(str(n)))
    assert time.process_time() - before < 2


def test_database_is_for_its_owner_alone(path: Path) -> None:
    Outbox(path, 100, 10_000).close()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM message").fetchone() == (0,)
