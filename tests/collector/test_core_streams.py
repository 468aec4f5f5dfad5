"""The socket on which the collector takes cores that lie nowhere else."""

import asyncio
import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from crashbus import crash_id, layout
from crashbus.layout import Kind
from crashbus.parts import CrashFile
from services.collector import core_frames, core_streams
from services.collector.core_streams import AT_ONCE
from services.common import core_stream
from services.common.capture import CapturedFile
from services.common.core_stream import ANNOUNCED, DATA, END, FRAME, ZEROS, Announced, Answer
from tests.collector.conftest import FILE, Setup, reports
from tests.collector.stand_in import write_set
from tests.support.records import EPOCH, Writing, process
from tests.support.wait import until

PID = 4_000_001
DIRECTORY, NAME = str(PID), f"core_{EPOCH}"
CRASH_ID = crash_id("boot", PID, 1)
HELLO = Announced(crash_id=CRASH_ID, directory=DIRECTORY, name=NAME).model_dump_json().encode()


def frame(kind: bytes, content: bytes) -> bytes:
    return FRAME.pack(kind, len(content)) + content


WHOLE = frame(ANNOUNCED, HELLO) + frame(DATA, b"core") + FRAME.pack(ZEROS, 3 << 20)


async def begun(setup: Setup) -> socket.socket:
    """Return a connection whose turn it is."""
    await setup.collector.start()
    await setup.collector.healthy()
    await until(lambda: core_stream.identity(setup.spool))
    return await connected(setup)


async def connected(setup: Setup) -> socket.socket:
    connection = core_stream.connect(setup.spool, 60)
    while (told := await asyncio.to_thread(connection.recv, 1)) == core_stream.QUEUED:
        pass
    assert told == core_stream.GREETING
    return connection


async def answer(connection: socket.socket) -> Answer | None:
    """Return what is answered; None: it was closed without a word."""
    try:
        text = await asyncio.to_thread(connection.recv, core_stream.MAX_TEXT)
    except ConnectionResetError:
        text = b""
    return Answer.model_validate_json(text) if text else None


async def chunks(setup: Setup) -> int:
    return await setup.bus.chunk_count(CRASH_ID, NAME)


async def nothing_left(setup: Setup) -> bool:
    marks = setup.state / "collector" / "streamed"
    return await chunks(setup) == 0 and not list(marks.glob("*"))


async def test_core_stays_on_the_bus_as_long_as_its_record_may_name_it(setup: Setup) -> None:
    writing = Writing(setup.spool, process(PID))
    with await begun(setup) as connection:
        connection.sendall(WHOLE + FRAME.pack(END, 0))
        found = await answer(connection)
    assert found is not None
    assert found.file is not None
    assert found.file.size == 4 + (3 << 20)
    await setup.collector.stop()

    # A collector that was started anew has looked at what there is when it listens.
    with await begun(setup):
        assert await chunks(setup) == found.file.chunks
    writing.end()

    await until(lambda: nothing_left(setup))


@pytest.mark.parametrize("ends", ["complete", "killed"])
async def test_core_on_the_bus_is_delivered_where_no_other_file_could_be_made(
    setup: Setup, shipper: asyncio.Task[None], ends: str
) -> None:
    writing = Writing(setup.spool, process(PID))
    with await begun(setup) as connection:
        connection.sendall(WHOLE + FRAME.pack(END, 0))
        found = await answer(connection)
    assert found is not None and found.file is not None
    note = f"info_{EPOCH} could not be made: No space left on device"
    writing.note(note, **{NAME: CapturedFile(size=found.file.size, sent=found.file)})

    if ends == "complete":
        writing.complete({})
    else:
        writing.end()

    await setup.shipper.has(FILE, NAME, "manifest.json")
    (manifest,) = await reports(setup)
    assert [(file.name, file.sha256) for file in manifest.files] == [(NAME, found.file.sha256)]
    assert note in manifest.notes
    assert any("cut short" in one for one in manifest.notes) is (ends == "killed")
    await until(lambda: nothing_left(setup))


async def test_record_alone_is_no_crash_unless_it_is_roots_and_names_a_core(setup: Setup) -> None:
    forged = Writing(setup.spool, process(PID + 1))
    sent = CrashFile(
        name=NAME, kind=Kind.CORE, size=4, sha256="0" * 64, encoding="zstd", stored_size=4, chunks=1
    )
    forged.complete({NAME: CapturedFile(size=4, sent=sent)})
    os.chown(forged.place / f"capture_{EPOCH}", 1, 1)
    unreadable = Writing(setup.spool, process(PID + 2))
    unreadable.end()
    (unreadable.place / f"capture_{EPOCH}").write_text("{")
    await setup.collector.start()
    await setup.collector.healthy()
    known = write_set(setup.spool, PID + 3, {Kind.INFO: b"x"})

    (manifest,) = await reports(setup)

    assert manifest.crash_id == known
    assert "cannot gather" not in setup.collector.log


BROKEN = (
    b"",
    b"x" * 100,
    FRAME.pack(ANNOUNCED, 1 << 60),
    frame(ANNOUNCED, b"{}"),
    frame(ANNOUNCED, HELLO.replace(b"4000001", b"../etc")),
    frame(DATA, b"core") + FRAME.pack(END, 0),
    WHOLE + b"?" * 100,
    WHOLE + FRAME.pack(DATA, 1 << 60) + b"core",
    WHOLE,
)


async def test_what_does_not_come_to_its_end_leaves_nothing(setup: Setup) -> None:
    (await begun(setup)).close()
    for sent in BROKEN:
        with await connected(setup) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert await answer(connection) is None

    await until(lambda: nothing_left(setup))
    (await connected(setup)).close()


async def test_socket_comes_back_with_the_spool(setup: Setup) -> None:
    (await begun(setup)).close()
    path = setup.spool / layout.CORES / "socket"
    path.unlink()

    await until(path.exists)

    (await connected(setup)).close()


async def test_who_waits_for_a_turn_is_told_so(setup: Setup) -> None:
    taken = [await begun(setup)] + [await connected(setup) for _ in range(AT_ONCE - 1)]
    with core_stream.connect(setup.spool, 60) as waiting:
        assert await asyncio.to_thread(waiting.recv, 1) == core_stream.QUEUED
        taken.pop().close()
        while (told := await asyncio.to_thread(waiting.recv, 1)) == core_stream.QUEUED:
            pass
        assert told == core_stream.GREETING
    for one in taken:
        one.close()


async def test_mark_that_cannot_be_written_is_answered(setup: Setup) -> None:
    (setup.state / "collector").mkdir(parents=True)
    (setup.state / "collector" / "streamed").write_text("no directory")
    with await begun(setup) as connection:
        connection.sendall(WHOLE + FRAME.pack(END, 0))
        told = await answer(connection)
    assert told is not None and told.file is None
    assert "CRASHBUS_STATE" in told.fault


async def test_recorder_that_falls_silent_loses_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_frames, "SILENCE", 0.1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(frame(ANNOUNCED, HELLO))
        stream = core_frames.CoreFrames(ours)
        await stream.announced()
        with pytest.raises(core_frames.Broken, match="sent nothing"):
            await asyncio.wait_for(stream.read(10), 60)


def test_record_that_cannot_be_opened_just_now_may_name_the_core(tmp_path: Path) -> None:
    (tmp_path / DIRECTORY).mkdir()
    nobody: Any = None
    cores = core_streams.CoreStreams(tmp_path, nobody, nobody, nobody, tmp_path / "marks")
    assert not cores._is_named(DIRECTORY, NAME)  # it is not there

    (tmp_path / DIRECTORY / f"capture_{EPOCH}").write_text("{}")
    least = resource.getrlimit(resource.RLIMIT_NOFILE)
    directories = [os.open(tmp_path, os.O_RDONLY) for _ in range(2)]
    for one in directories:
        os.close(one)
    # Room for the descriptors of both directories, and none for the record.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(directories) + 1, least[1]))
    try:
        assert cores._is_named(DIRECTORY, NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, least)
