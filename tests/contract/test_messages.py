"""The wire contract: what is written is what is read, and nothing else is."""

import json
from typing import Any

import jsonschema
import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.js import JetStreamContext
from pydantic import ValidationError

from crashbus import Bus, DeadLetter, MalformedMessage, Manifest, Receipt, SignalEvent, WorkItem
from crashbus.layout import Kind
from crashbus.message_base import Message
from crashbus.messages import ALL, EventsLost, Postponed, Replay, SignalCount, json_schema
from crashbus.parts import Attempt, Container, CrashFile, Handler, Oom, Process, Sender
from tests.cli.support import make
from tests.support.wait import until

# What msgpack and JSON can carry: text is Unicode, integers have 64 bits.
text = st.text(max_size=50)
natural = st.integers(0, 2**63 - 1)
positive = st.integers(1, 2**63 - 1)
whole = st.integers(-(2**63), 2**63 - 1)
int32 = st.integers(-(2**31), 2**31 - 1)
words = st.integers(0, 2**64 - 1)
pids = st.integers(0, 2**31 - 1)
users = st.integers(0, 2**32 - 1)
time = st.floats(0, 253402300799, allow_nan=False)
hosts = st.text(min_size=1, max_size=253)
urls = st.text(min_size=1, max_size=200)
ids = st.text("0123456789abcdefghjkmnpqrstvwxyz", min_size=16, max_size=16)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
names = st.from_regex(r"(info|core|backtrace)_[0-9]{1,12}", fullmatch=True)


def tuples(of: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, min_size=least, max_size=3).map(tuple)


def maybe(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | of


containers = st.builds(Container, id=text, runtime=text, name=maybe(text), image=maybe(text))
processes = st.builds(
    Process,
    boot_id=text,
    pid=pids,
    ns_pid=pids,
    start_ticks=natural,
    uid=users,
    gid=users,
    comm=text,
    executable=maybe(text),
    command_line=tuples(text),
    cgroup=maybe(text),
    container=maybe(containers),
)
files = st.builds(
    CrashFile,
    name=names,
    kind=st.sampled_from(Kind),
    size=natural,
    sha256=hashes,
    encoding=st.sampled_from(["zstd", "identity"]),
    stored_size=natural,
    chunks=natural,
    truncated=st.booleans(),
    note=maybe(text),
)
stamps: dict[str, Any] = {"host": hosts, "time": time}
of_crash: dict[str, Any] = {**stamps, "crash_id": ids}
work_items = st.builds(
    WorkItem,
    **of_crash,
    crashed_at=time,
    process_name=text,
    destination=urls,
    files=tuples(files, 1),
)
MESSAGES: dict[type[Message], st.SearchStrategy[Message]] = {
    SignalEvent: st.builds(
        SignalEvent,
        **of_crash,
        event_id=st.text(min_size=1, max_size=64),
        monotonic_ns=natural,
        process=processes,
        tid=pids,
        signal=st.integers(1, 64),
        signal_name=text,
        code=int32,
        code_meaning=text,
        errno=int32,
        fault_address=maybe(words),
        sender=maybe(st.builds(Sender, pid=users, uid=users)),
        disposition=st.sampled_from(["default", "handled", "oom_kill"]),
        handler=maybe(st.builds(Handler, address=words, flags=words, appscope=st.booleans())),
        oom=maybe(st.builds(Oom, total_vm_kib=maybe(whole), oom_score_adj=maybe(whole))),
    ),
    SignalCount: st.builds(
        SignalCount,
        **of_crash,
        process=processes,
        signal=st.integers(1, 64),
        signal_name=text,
        count=positive,
        period=st.floats(0, 1e6, exclude_min=True),
    ),
    EventsLost: st.builds(
        EventsLost, **stamps, stage=st.sampled_from(["ring_buffer", "outbox"]), count=positive
    ),
    WorkItem: work_items,
    Manifest: st.builds(
        Manifest,
        **of_crash,
        crashed_at=time,
        process_name=text,
        revision=positive,
        process=processes,
        signal=st.integers(0, 64),
        signal_name=text,
        code=maybe(int32),
        code_meaning=maybe(text),
        fault_address=maybe(words),
        files=tuples(files),
        destinations=tuples(urls),
        notes=tuples(text),
    ),
    Receipt: st.builds(
        Receipt,
        **of_crash,
        file=files,
        destination=urls,
        url=urls,
        attempts=positive,
        shipper=text,
    ),
    DeadLetter: st.builds(
        DeadLetter,
        **stamps,
        crash_id=maybe(ids),
        service=text,
        reason=st.from_regex(r"[a-z][a-z0-9_]{0,63}", fullmatch=True),
        error=text,
        mend=text,
        attempts=natural,
        history=tuples(st.builds(Attempt, time=time, error=text)),
        work=maybe(work_items),
        subject_received=maybe(text),
        payload_received=maybe(st.binary(max_size=100)),
    ),
    Postponed: st.builds(
        Postponed,
        **of_crash,
        destination=urls,
        files=st.lists(names, min_size=1, max_size=3).map(tuple),
        reason=st.from_regex(r"[a-z][a-z0-9_]{0,63}", fullmatch=True),
        error=text,
        mend=text,
        attempts=natural,
        next_try=time,
        given_up=time,
    ),
    Replay: st.builds(
        Replay,
        **of_crash,
        destination=urls,
        files=st.lists(names, min_size=1, max_size=3).map(tuple),
        failed_at=time,
    ),
}
any_message = st.one_of(*MESSAGES.values())
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)


def test_every_message_is_tried_here() -> None:
    assert set(MESSAGES) == set(ALL)


@quick
@given(any_message)
def test_what_is_encoded_is_decoded(message: Message) -> None:
    assert type(message).decode(message.encode(), message.subject) == message


@quick
@given(any_message)
def test_json_form_keeps_the_schema_and_comes_back(message: Message) -> None:
    as_json = message.model_dump_json()
    jsonschema.Draft202012Validator(json_schema(type(message))).validate(json.loads(as_json))
    assert type(message).model_validate_json(as_json) == message


@pytest.mark.parametrize("kind", ALL)
def test_the_schema_is_one(kind: type[Message]) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema(kind))


@quick
@given(any_message)
def test_a_subject_is_tokens_below_its_wildcard(message: Message) -> None:
    head = message.SUBJECT.removesuffix(">")
    assert message.subject.startswith(head)
    assert all(message.subject.split("."))
    assert message.subject.isascii()
    assert not set(message.subject) & set(" *>\t\r\n\0")


@quick
@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_malformed(payload: bytes) -> None:
    for kind in ALL:
        with pytest.raises(MalformedMessage):
            kind.decode(payload, "x")


anything = st.recursive(
    st.none() | st.booleans() | whole | st.floats() | text | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@quick
@given(any_message, st.data())
def test_a_field_of_any_other_kind_is_read_or_malformed_and_never_worse(
    message: Message, data: st.DataObject
) -> None:
    fields = msgpack.unpackb(message.encode())
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(anything)
    try:
        type(message).decode(msgpack.packb(fields), "x")
    except MalformedMessage as error:
        assert error.payload == msgpack.packb(fields)


POISON = {
    "a key that is a list": b"\x81\x90\x01",
    "a key that is a map": b"\x81\x80\x01",
    "a key that is a number": b"\x81\x01\x01",
    "a list": b"\x90",
    "nothing": b"",
    "text": b"\xa1x",
    "the reserved byte": b"\xc1",
    "bytes behind the map": b"\x80\x80",
    "a list of four thousand million": b"\xdd\xff\xff\xff\xff",
    "lists in lists": b"\x91" * 100_000,
    "a timestamp out of range": b"\x81\xa1x\xd7\xff" + b"\xff" * 8,
    "text that is no UTF-8": b"\x81\xa4host\xa1\xff",
}


@pytest.mark.parametrize("payload", POISON.values(), ids=POISON)
def test_poison_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedMessage):
        SignalEvent.decode(payload, "crash.signal.x.y")


def changed(**fields: Any) -> bytes:
    """Return a receipt with some fields changed; None leaves one out."""
    receipt = msgpack.unpackb(make(destinations=("file:///a",)).receipts()[0].encode())
    receipt.update(fields)
    left = {name: value for name, value in receipt.items() if value is not None}
    return bytes(msgpack.packb(left))


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.999999999"])
def test_a_newer_minor_version_is_read_without_what_it_adds(version: str) -> None:
    receipt = Receipt.decode(changed(v=version, added={"some": ["thing"]}))
    assert receipt.v == version
    assert not hasattr(receipt, "added")


@pytest.mark.parametrize("version", ["2.0", "0.9", "1", "1.", "1.x", "10.0", "1.0\n", "", 1.0])
def test_another_major_version_is_malformed(version: object) -> None:
    with pytest.raises(MalformedMessage, match="field 'v'"):
        Receipt.decode(changed(v=version), "crash.shipped.x.y")


@pytest.mark.parametrize("name", ["v", "time", "host", "crash_id", "file", "url"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(MalformedMessage, match=f"field '{name}': Field required"):
        Receipt.decode(changed(**{name: None}), "crash.shipped.x.y")


@pytest.mark.parametrize(
    "fields",
    [
        {"crash_id": "0" * 15},
        {"crash_id": "i" * 16},
        {"time": float("nan")},
        {"time": float("inf")},
        {"time": -1.0},
        {"host": ""},
        {"attempts": 0},
        {"url": "x" * 2049},
    ],
)
def test_a_value_out_of_range_is_malformed(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(MalformedMessage, match=f"field '{name}'"):
        Receipt.decode(changed(**fields), "crash.shipped.x.y")


OUT_OF_RANGE: list[tuple[tuple[str, ...], Any]] = [
    (("process", "pid"), 2**31),
    (("process", "ns_pid"), 2**31),
    (("process", "uid"), 2**32),
    (("process", "gid"), -1),
    (("process", "comm"), "x" * 257),
    (("process", "executable"), "x" * 32769),
    (("process", "cgroup"), "x" * 32769),
    (("process", "start_ticks"), 2**63),
    (("monotonic_ns",), 2**63),
    (("tid",), 2**31),
    (("code",), 2**31),
    (("errno",), -(2**31) - 1),
    (("fault_address",), 2**64),
    (("sender",), {"pid": 2**32, "uid": 0}),
    (("sender",), {"pid": 1, "uid": 2**32}),
    (("handler",), {"address": 2**64, "flags": 0, "appscope": False}),
    (("handler",), {"address": 0, "flags": 2**64, "appscope": False}),
    (("oom",), {"oom_score_adj": 2**63}),
]


@pytest.mark.parametrize(("place", "value"), OUT_OF_RANGE)
def test_a_number_no_machine_has_is_refused(place: tuple[str, ...], value: Any) -> None:
    fields = make().event.model_dump()
    inner = fields
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(ValidationError, match=r"\.".join(place)):
        SignalEvent.model_validate(fields)


@pytest.mark.parametrize("field", ["size", "stored_size", "chunks"])
def test_a_file_of_no_possible_size_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        CrashFile.model_validate(make().manifest.files[0].model_dump() | {field: 2**63})


def test_a_report_lists_a_bounded_number_of_files() -> None:
    fields = make().manifest.model_dump()
    fields["files"] = fields["files"][:1] * 1025
    with pytest.raises(ValidationError, match="files"):
        Manifest.model_validate(fields)


def test_a_revision_is_one_at_least() -> None:
    with pytest.raises(ValidationError, match="revision"):
        Manifest.model_validate(make().manifest.model_dump() | {"revision": 0})


@pytest.mark.parametrize("name", ["..", "a/b", "/etc/passwd", "", ".hidden", "a\0b", "x" * 256])
def test_a_file_name_that_leads_elsewhere_is_malformed(name: str) -> None:
    file = make().manifest.files[0].model_dump(mode="json") | {"name": name}
    with pytest.raises(MalformedMessage, match=r"field 'file\.name'"):
        Receipt.decode(changed(file=file), "crash.shipped.x.y")


async def test_a_malformed_message_is_counted_kept_whole_and_does_not_come_again(
    bus: Bus,
) -> None:
    payload = changed(v="2.0", secret=b"\xff\x00")
    await bus.publish_raw("crash.shipped.x.y", payload)
    good = make(destinations=("file:///a",)).receipts()[0]
    await bus.publish(good)

    work = bus.consume(Receipt, "reader", service="test")
    delivery = await anext(work)
    assert delivery.message == good
    await delivery.ack()
    assert bus.malformed == 1

    (letter,) = await bus.stored(DeadLetter)
    assert letter.reason == "malformed_message"
    assert letter.service == "test"
    assert letter.host == "test-host"
    assert letter.subject_received == "crash.shipped.x.y"
    assert letter.payload_received == payload
    assert "field 'v'" in letter.error

    async def settled() -> bool:
        js: JetStreamContext = bus._js
        info = await js.consumer_info("CRASH_RECEIPTS", "reader")
        return bool(info.num_ack_pending == 0 and info.num_pending == 0)

    await until(settled)


async def test_who_reads_what_is_stored_counts_malformed_messages_and_goes_on(bus: Bus) -> None:
    good = make(destinations=("file:///a",)).receipts()[0]
    await bus.publish_raw("crash.shipped.x.y", b"\x81\x90\x01")
    await bus.publish(good)
    assert await bus.stored(Receipt) == [good]
    assert bus.malformed == 1
