"""Sets of one crash become one manifest, however they were found: in parts, again, in any order."""

import asyncio
import tempfile
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashbus import crash_id, layout
from crashbus.layout import Kind, crash_file_name
from crashbus.messages import Manifest
from crashbus.parts import Container, CrashFile, Module, Process
from services.collector.entering import Entering
from services.collector.found import FoundSet
from services.collector.judge import Cause, RecordState, Verdict
from services.collector.ledger import Crash, Ledger
from services.collector.spool import Entry
from services.common.capture import CaptureRecord

BOOT, PID, START = "boot", 7, 1
KINDS = (Kind.INFO, Kind.CFG, Kind.BACKTRACE, Kind.CORE)
NAMES = [(epoch, kind) for epoch in (101, 102, 103) for kind in KINDS]
PROCESS = Process(
    boot_id=BOOT, pid=PID, ns_pid=PID, start_ticks=START, uid=0, gid=0, comm="recovers"
)

# What one look finds: some of the files of one epoch.
LOOKS = st.lists(
    st.tuples(st.sampled_from((101, 102, 103)), st.sets(st.sampled_from(KINDS), min_size=1)),
    max_size=12,
)


def look(epoch: int, kinds: set[Kind]) -> FoundSet:
    entries = {
        kind: Entry(crash_file_name(kind, epoch), kind, epoch, 1, 0, (1, 1)) for kind in kinds
    }
    return FoundSet(str(PID), epoch, entries, Verdict.WHOLE, None, None, None, None, "recovers")


def read(crash: Crash) -> Manifest:
    """Return the manifest once all files were read."""
    for source in crash.sources.values():
        source.file = CrashFile(
            name=source.name,
            kind=source.kind,
            size=1,
            sha256="0" * 64,
            encoding="identity",
            stored_size=1,
            chunks=1,
        )
    crash.revision += 1
    return crash.to_manifest()


@settings(max_examples=60)
@given(LOOKS, st.sets(st.integers(0, 11)))
def test_any_looks_in_any_order_make_the_manifest_of_all_that_was_seen(
    looks: list[tuple[int, set[Kind]]], restarts: set[int]
) -> None:
    """The collector may be started anew between any two looks."""
    with tempfile.TemporaryDirectory() as directory:
        ledger, told = asyncio.run(enter(Path(directory), looks, restarts))
    seen = {(epoch, kind) for epoch, kinds in looks for kind in kinds}
    if not seen:
        assert ledger.crashes() == []
        return
    (crash,) = ledger.crashes()
    assert crash.crash_id == crash_id(BOOT, PID, START)
    files = read(crash).files
    assert sorted(file.name for file in files) == sorted(
        crash_file_name(kind, epoch) for epoch, kind in seen
    )
    ranks = [layout.SHIPPING_ORDER.index(file.kind) for file in files]
    assert ranks == sorted(ranks), "small files first, cores last"
    assert crash.delivered_at is None
    assert told == sum(is_new(looks, number) for number in range(len(looks)))


def is_new(looks: list[tuple[int, set[Kind]]], number: int) -> bool:
    """Tell whether a look found a file that none before it had found."""
    epoch, kinds = looks[number]
    before = {kind for other, found in looks[:number] if other == epoch for kind in found}
    return bool(kinds - before)


async def enter(
    directory: Path, looks: list[tuple[int, set[Kind]]], restarts: set[int]
) -> tuple[Ledger, int]:
    """Enter what looks found; return the ledger and how often a crash was told to be new."""
    told: list[Crash] = []
    for number, (epoch, kinds) in enumerate(looks):
        if number == 0 or number in restarts:
            ledger = loaded(directory)
            entering = Entering(directory, "h", BOOT, ("file:///a",), ledger, told.append)
        await entering.enter(look(epoch, kinds), PROCESS)
    return loaded(directory), len(told)


def loaded(directory: Path) -> Ledger:
    ledger = Ledger(directory / "ledger")
    ledger.load()
    return ledger


CONTAINER = Container(id="a" * 64, runtime="docker")
NAMED = CONTAINER.model_copy(update={"name": "web", "image": "nginx", "labels": {"team": "x"}})
MODULE = Module(path="/bin/x", build_id="ab" * 20)


def recorded(
    epoch: int, signal: str, number: int, container: Container, **told: object
) -> FoundSet:
    """Return a set with its capture record."""
    record = CaptureRecord.model_validate(
        {
            "state": "complete",
            "crash_id": crash_id(BOOT, PID, START),
            "host": "h",
            "crashed_at": epoch + 0.5,
            "process": PROCESS.model_copy(update={"container": container}),
            "signal": number,
            "signal_name": signal,
            **told,
        }
    )
    found = look(epoch, {Kind.INFO, Kind.BACKTRACE})
    return replace(found, record=RecordState(record, False))


# AppScope's library handles a signal and aborts two seconds later, of which the recorder makes a
# set; what it wrote in a container is brought out whenever there is room for it.
SETS = {
    "appscope": replace(look(100, set(KINDS)), cause=Cause(11, 0x10, "address not mapped")),
    "recorder": recorded(
        102,
        "SIGABRT",
        6,
        NAMED,
        fingerprint="1" * 16,
        build_fingerprint="2" * 16,
        modules=(MODULE,),
        notes=("cut to its stacks",),
    ),
    "brought out": recorded(101, "SIGSEGV", 11, CONTAINER, notes=("in its own place",)),
}


@pytest.mark.parametrize("order", [*permutations(SETS)], ids=" - ".join)
async def test_sets_of_all_kinds_tell_the_same_in_any_order(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    process = PROCESS.model_copy(update={"container": CONTAINER})
    ledger = loaded(tmp_path)
    entering = Entering(tmp_path, "h", BOOT, ("file:///a",), ledger, lambda _: None)

    for name in order:
        await entering.enter(SETS[name], process if name == "appscope" else None)

    (crash,) = loaded(tmp_path).crashes()
    assert (crash.signal_name, crash.signal, crash.fault_address) == ("SIGSEGV", 11, 0x10)
    assert crash.code_meaning == "address not mapped"
    assert crash.process.container == NAMED
    assert crash.modules == (MODULE,)
    assert (crash.fingerprint, crash.build_fingerprint) == ("1" * 16, "2" * 16)
    assert sorted(crash.notes) == ["cut to its stacks", "in its own place"]
    assert len(crash.sources) == 8


@pytest.mark.parametrize("order", [*permutations(("recovered", "recorder", "forged"))])
async def test_signal_of_another_hour_is_not_what_a_process_died_of(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    sets = {
        "recovered": replace(look(100, {Kind.INFO}), cause=Cause(11, 0x10, "not mapped")),
        "recorder": recorded(7300, "SIGABRT", 6, NAMED),
        "forged": replace(look(9999, {Kind.INFO}), cause=Cause(8, None, None)),
    }
    ledger = loaded(tmp_path)
    entering = Entering(tmp_path, "h", BOOT, ("file:///a",), ledger, lambda _: None)

    for name in order:
        await entering.enter(sets[name], PROCESS)

    (crash,) = loaded(tmp_path).crashes()
    assert (crash.signal_name, crash.signal, crash.fault_address) == ("SIGABRT", 6, None)


@pytest.mark.parametrize("former", [False, True])
async def test_signal_is_the_first_however_long_appscope_wrote_or_by_what_version(
    former: bool, tmp_path: Path
) -> None:
    ledger = loaded(tmp_path)
    entering = Entering(tmp_path, "h", BOOT, ("file:///a",), ledger, lambda _: None)
    first = replace(look(100, {Kind.INFO}), cause=Cause(11, 0x10, "not mapped"))
    await entering.enter(first, PROCESS)
    (crash,) = ledger.crashes()
    if former:
        crash.signal_at = 0.0

    await entering.enter(recorded(190, "SIGABRT", 6, NAMED), PROCESS)

    assert (crash.signal_name, crash.fault_address) == ("SIGSEGV", 0x10)


@pytest.mark.parametrize("other", [{"directory": "8"}, {"owner": 65534}])
async def test_recorded_set_whose_names_are_taken_tells_all_that_its_record_does(
    other: dict[str, Any], tmp_path: Path
) -> None:
    ledger = loaded(tmp_path)
    entering = Entering(tmp_path, "h", BOOT, ("file:///a",), ledger, lambda _: None)
    await entering.enter(look(102, {Kind.INFO}), PROCESS)
    (first,) = ledger.crashes()
    name = crash_file_name(Kind.INFO, 102)
    first.sources[name] = first.sources[name].model_copy(update=other)
    await ledger.save(first)
    ledger = loaded(tmp_path)  # it knows the first file by its former place no more
    entering = Entering(tmp_path, "h", BOOT, ("file:///a",), ledger, lambda _: None)

    await entering.enter(SETS["recorder"], None)

    (apart,) = [one for one in ledger.crashes() if one.crash_id != first.crash_id]
    assert (apart.signal_name, apart.fingerprint) == ("SIGABRT", "1" * 16)
    assert (apart.modules, apart.process.container) == ((MODULE,), NAMED)
    assert len(apart.sources) == 2
    assert f"another set of crash {first.crash_id} has files of the same names" in apart.notes


async def test_folder_of_what_may_be_delivered_already_keeps_its_name(tmp_path: Path) -> None:
    """At the destinations it is named after time and name of the crash."""
    ledger = loaded(tmp_path)
    entering = Entering(tmp_path, "h", BOOT, ("file:///a",), ledger, lambda _: None)
    await entering.enter(SETS["recorder"], None)
    (crash,) = ledger.crashes()
    before = crash.crashed_at, crash.process.comm

    await entering.enter(SETS["appscope"], PROCESS.model_copy(update={"comm": "renamed"}))

    assert (crash.crashed_at, crash.process.comm) == before
