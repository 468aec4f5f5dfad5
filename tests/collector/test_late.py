"""What is on the bus of crashes that are delivered, and for nobody."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashbus import Bus, Manifest, Receipt, crash_id, streams
from crashbus.chunks import Chunk
from crashbus.layout import MANIFEST_NAME, Kind, crash_file_name
from crashbus.parts import CrashFile, Process
from services.collector.late import Late, is_delivered
from services.collector.ledger import Crash, Ledger

PLACES = ("file:///a", "s3://bucket/b", "tcp://h:1")
HOST = "h"
CRASH_ID = crash_id("boot", 1, 1)
PROCESS = Process(boot_id="boot", pid=1, ns_pid=1, start_ticks=1, uid=0, gid=0, comm="x")


def file(kind: Kind, name: str) -> CrashFile:
    return CrashFile(
        name=name,
        kind=kind,
        size=1,
        sha256=kind.encode().hex().ljust(64, "0"),
        encoding="identity",
        stored_size=1,
        chunks=1,
    )


FILES = tuple(file(kind, crash_file_name(kind, 1)) for kind in (Kind.INFO, Kind.CORE))
MANIFEST = Manifest(
    host=HOST,
    crash_id=CRASH_ID,
    crashed_at=1.0,
    process_name="x",
    revision=1,
    process=PROCESS,
    signal=11,
    signal_name="SIGSEGV",
    files=FILES,
    destinations=PLACES,
)


def receipt(place: str, one: CrashFile) -> Receipt:
    return Receipt(
        host=HOST,
        crash_id=CRASH_ID,
        file=one,
        destination=place,
        url=place,
        attempts=1,
        shipper="s",
    )


# A raw TCP destination gets no core and no manifest.json.
ALL = [
    *(receipt(place, one) for place in PLACES[:2] for one in FILES),
    receipt(PLACES[2], FILES[0]),
    *(receipt(place, file(Kind.MANIFEST, MANIFEST_NAME)) for place in PLACES[:2]),
]


@given(st.lists(st.sampled_from(ALL), max_size=20))
def test_a_crash_is_delivered_when_all_receipts_are_there_and_not_before(
    came: list[Receipt],
) -> None:
    pairs = {(one.destination, one.file.name) for one in came}
    assert is_delivered(MANIFEST, came) is (len(pairs) == len(ALL))
    assert is_delivered(MANIFEST, came + ALL)


@pytest.fixture
async def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger")
    made.load()
    return made


async def left_after_a_look(
    bus: Bus, ledger: Ledger, *, ahead: str = "", straight: str = ""
) -> int:
    sending: Any = SimpleNamespace(has=lambda name: name == ahead)
    cores: Any = SimpleNamespace(has=lambda name: name == straight)
    late = Late(HOST, bus, ledger, sending, cores, recheck=1)
    for name in ("info_1", "core_1"):
        await bus.publish_chunk(CRASH_ID, name, Chunk(0, 1, b"x", ""))
    await late.look()
    return sum([await bus.chunk_count(CRASH_ID, name) for name in ("info_1", "core_1")])


async def tell(bus: Bus, receipts: list[Receipt], host: str = HOST) -> None:
    await bus.publish(MANIFEST.model_copy(update={"host": host}))
    for one in receipts:
        await bus.publish(one)


async def test_copies_of_what_is_delivered_are_removed(bus: Bus, ledger: Ledger) -> None:
    await tell(bus, ALL)
    assert await left_after_a_look(bus, ledger) == 0


async def test_chunks_of_what_is_still_to_be_delivered_stay(bus: Bus, ledger: Ledger) -> None:
    """Its entry was lost with the disk that it was on."""
    await tell(bus, ALL[1:])
    assert await left_after_a_look(bus, ledger) == 2


async def test_chunks_of_another_host_s_crash_stay(bus: Bus, ledger: Ledger) -> None:
    await tell(bus, ALL, host="another")
    assert await left_after_a_look(bus, ledger) == 2


@pytest.mark.parametrize(("delivered_at", "left"), [(None, 2), (1.0, 0)])
async def test_of_a_crash_that_is_known_the_ledger_decides(
    bus: Bus, ledger: Ledger, delivered_at: float | None, left: int
) -> None:
    """It tells more than receipts do: the process may have crashed once more since."""
    await tell(bus, ALL)
    crash = Crash(crash_id=CRASH_ID, host=HOST, crashed_at=1.0, process=PROCESS)
    crash.delivered_at = delivered_at
    await ledger.save(crash)
    assert await left_after_a_look(bus, ledger) == left


async def test_items_that_a_killed_server_has_back_are_removed(bus: Bus, ledger: Ledger) -> None:
    await tell(bus, ALL)
    for host in (HOST, "another"):
        await bus._js.publish(f"crash.file.{host}.{crash_id('b', 1, 1)}.info_1.x", b"not ours")
    await bus._js.publish(f"crash.file.{HOST}.{CRASH_ID}.info_1.x", b"was acknowledged")
    assert await left_after_a_look(bus, ledger) == 0
    assert (await bus._js.stream_info(streams.FILES)).state.messages == 2


async def test_chunks_of_a_core_that_is_sent_ahead_stay(bus: Bus, ledger: Ledger) -> None:
    await tell(bus, ALL)
    assert await left_after_a_look(bus, ledger, ahead=CRASH_ID) == 2


async def test_chunks_of_a_core_that_lies_nowhere_else_stay(bus: Bus, ledger: Ledger) -> None:
    """Its process was delivered once already: by AppScope, or as a snapshot."""
    await tell(bus, ALL)
    assert await left_after_a_look(bus, ledger, straight=CRASH_ID) == 2
