"""What is said of the files of a set whose recorder was killed before it was done."""

from crashbus.identity import crash_id
from crashbus.layout import Kind, crash_file_name
from crashbus.parts import Process
from services.collector.found import FoundSet, source_of
from services.collector.judge import RecordState, Verdict
from services.collector.spool import Entry
from services.common.capture import CapturedFile, CaptureRecord

EPOCH, SIZE = 1795388839, 5000


def cut_short(files: dict[str, CapturedFile]) -> FoundSet:
    """Return a set with a core, and with what its record says of its files."""
    process = Process(boot_id="boot", pid=7, ns_pid=7, start_ticks=1, uid=0, gid=0, comm="x")
    record = CaptureRecord(
        state="writing",
        crash_id=crash_id("boot", 7, 1),
        host="test-host",
        crashed_at=float(EPOCH),
        process=process,
        signal=11,
        signal_name="SIGSEGV",
        files=files,
    )
    core = Entry(crash_file_name(Kind.CORE, EPOCH), Kind.CORE, EPOCH, SIZE, 0, (1, 1))
    return FoundSet(
        directory="7",
        epoch=EPOCH,
        entries={Kind.CORE: core},
        verdict=Verdict.CUT_SHORT,
        record=RecordState(record, being_written=False),
        writer=None,
        promised=None,
        cause=None,
        comm="x",
    )


def note(files: dict[str, CapturedFile]) -> str | None:
    found = cut_short(files)
    return source_of(found, found.entries[Kind.CORE]).note


CORE = crash_file_name(Kind.CORE, EPOCH)


def test_core_that_the_record_calls_whole_is_whole() -> None:
    assert note({CORE: CapturedFile(size=SIZE)}) is None


def test_core_of_which_the_record_says_nothing_or_more_is_incomplete() -> None:
    assert note({}) == "its writer ended before it was whole"
    assert note({CORE: CapturedFile(size=SIZE + 1)}) == f"{SIZE} bytes, {SIZE + 1} were written"
    assert note({CORE: CapturedFile(size=SIZE, truncated=True, note="no room")}) == "no room"
