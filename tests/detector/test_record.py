"""From the kernel's bytes to an event: no kernel needed."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashbus import SignalEvent
from crashbus.parts import Process
from services.detector.counts import Counts
from services.detector.events import Clock, is_whole, joined, process_of, signal_event
from services.detector.proc import is_appscope
from services.detector.program import HandledKey
from services.detector.record import Kind, MalformedRecord, Record, parse

BOOT = "857fbe68-3976-4796-9447-afecab07dd80"
CLOCK = Clock(1_700_000_000.0)


def raw(
    text: bytes = b"leaf\0top\0run\0bin\0run\0-v\0", ends: tuple[int, ...] = (9, 9, 17, 24)
) -> bytes:
    return (
        struct.pack(
            "=5Q4qQ6I4iI5Hh4x16s",
            *(5_000_000_000, 123_456_789_000, 0xFFFFFFFFFFFFF000, 0, 0),
            *(-1, -1, -1, -1, 1 << 20),
            *(1, 100, 101, 7, 1000, 1001),
            *(11, 1, 0, 0, ends[3] - ends[2]),
            *(7, *ends, 1, b"crash\0rubbish"),
        )
        + text
    )


def record() -> Record:
    return parse(raw())


def test_fields_are_read() -> None:
    found = record()
    assert (found.kind, found.pid, found.tid, found.ns_pid) == (Kind.SIGNAL, 100, 101, 7)
    assert (found.uid, found.gid, found.comm) == (1000, 1001, b"crash")
    assert found.start_ticks == 12345
    assert (found.cgroup, found.cgroup_v1) == (b"/top/leaf", b"/")
    assert found.executable == b"/bin/run"
    assert found.arguments == b"run\0-v\0"
    assert (found.dumpable, found.core_limit) == (1, 1 << 20)
    assert is_whole(found)


@pytest.mark.parametrize("cut", [0, 50, 131, 155])
def test_record_cut_short_is_an_error(cut: int) -> None:
    with pytest.raises(MalformedRecord):
        parse(raw()[:cut])


def test_record_whose_parts_overlap_is_an_error() -> None:
    with pytest.raises(MalformedRecord, match="parts"):
        parse(raw(ends=(9, 8, 17, 24)))


@given(st.binary(max_size=400))
def test_any_bytes_are_a_record_or_malformed(data: bytes) -> None:
    try:
        found = parse(data)
    except MalformedRecord:
        return
    signal_event(found, process_of(found, BOOT), "h", CLOCK, False).encode()


@given(st.binary(min_size=24, max_size=24))
def test_any_text_makes_a_message_that_can_be_read(text: bytes) -> None:
    found = parse(raw(text))
    event = signal_event(found, process_of(found, BOOT), "h", CLOCK, False)
    assert SignalEvent.decode(event.encode()) == event


def test_event_of_a_fault() -> None:
    found = record()
    event = signal_event(found, process_of(found, BOOT), "h", CLOCK, False)
    assert event.time == 1_700_000_005.0
    assert event.fault_address == 0xFFFFFFFFFFFFF000
    assert event.sender is None
    assert event.process.command_line == ("run", "-v")
    again = signal_event(found, process_of(found, BOOT), "h", CLOCK, False)
    other = signal_event(replace(found, tid=102), process_of(found, BOOT), "h", CLOCK, False)
    assert event.event_id == again.event_id != other.event_id
    assert event.crash_id == other.crash_id


def test_event_of_a_sent_signal() -> None:
    found = replace(record(), code=0, detail=1000 << 32 | 4321)
    event = signal_event(found, process_of(found, BOOT), "h", CLOCK, False)
    assert event.fault_address is None
    assert event.sender is not None
    assert (event.sender.pid, event.sender.uid) == (4321, 1000)


def test_oom_kill_on_a_kernel_that_says_only_the_pid() -> None:
    found = replace(record(), kind=Kind.OOM_KILL, signal=9, code=0x80, start_boottime=0)
    proc = process_of(record(), BOOT).model_copy(update={"executable": "/from/proc"})
    process = joined(process_of(found, BOOT), proc, found)
    event = signal_event(found, process, "h", CLOCK, False)
    assert (event.disposition, event.process.executable) == ("oom_kill", "/from/proc")
    assert event.oom is not None
    assert event.oom.anon_rss_kib is None


def test_secret_that_the_kernel_cut_is_not_told_in_part() -> None:
    found = replace(record(), arguments=b"run\0a://user:S3cr", arguments_size=2000)
    assert process_of(found, BOOT).command_line == ("run", "a://<redacted>")


def test_command_line_is_bounded_whatever_was_passed() -> None:
    found = record()
    long = process_of(found, BOOT).model_copy(update={"command_line": ("\\xff" * 4096,) * 64})
    event = signal_event(found, long, "h", CLOCK, False)
    assert len(event.encode()) < 64 * 1024
    assert event.process.command_line[0] == "\\xff" * 4096


def test_what_the_kernel_could_not_read_comes_from_proc() -> None:
    found = replace(record(), executable=None, cgroup=None, arguments_size=5000)
    proc = Process(
        **process_of(record(), BOOT).model_dump()
        | {"executable": "/x", "cgroup": "/y", "command_line": ("a", "b"), "comm": "renamed"}
    )
    assert not is_whole(found)
    process = joined(process_of(found, BOOT), proc, found)
    assert (process.executable, process.cgroup, process.command_line) == ("/x", "/y", ("a", "b"))
    assert process.comm == "crash"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"/usr/lib/appscope/1.4.3/libscope.so", True),
        (b"/tmp/appscope/libscope-v1.4.3/libscope.so (deleted)", True),
        (b"/memfd:libscope.so (deleted)", True),
        (b"/usr/lib/libscopeguard.so", False),
        (b"/home/libscope.so/other.so", False),
        (b"[heap]", False),
        (None, False),
    ],
)
def test_appscopes_library_by_name(name: bytes | None, expected: bool) -> None:
    assert is_appscope(name) is expected


def test_counts_tell_only_what_is_new() -> None:
    process = process_of(record(), BOOT)
    key = HandledKey(process.pid, 123_456_789_000, 11)
    counts = Counts()
    counts.saw(process)
    assert [one.count for one in counts.news({key: 5})[0]] == [5]
    assert counts.news({key: 5}) == ([], 0)
    assert [one.count for one in counts.news({key: 9})[0]] == [4]
    assert [one.count for one in counts.news({key: 2})[0]] == [
        2
    ]  # the kernel forgot and began anew
    assert counts.news({}) == ([], 0)
    assert counts.news({HandledKey(1, 1, 11): 3}) == ([], 3)
