"""Crashes in pods of a real containerd, which is asked by the CRI what they are called."""

import asyncio
import socket
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from crashbus.parts import Container
from services.common.capture import CaptureRecord
from services.common.redact import REDACTED
from services.recorder import containers, cri
from tests.recorder.test_storm import memory_of
from tests.support.containerd import IMAGE, POD, Containerd
from tests.support.core_pattern import core_pattern_kept
from tests.support.recorder import FILES, RecorderService
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    made = Containerd()
    yield made
    made.close()


@contextmanager
def mounted_at(directory: Path) -> Iterator[Path]:
    """Give a further place of a directory, as a bind mount."""
    with tempfile.TemporaryDirectory(prefix="cb-", dir="/tmp") as place:
        subprocess.run(["mount", "--bind", directory, place], check=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def recorder(containerd: Containerd) -> AsyncIterator[RecorderService]:
    # As in a container: of the socket, not its directory, a restart would leave the old one there.
    with core_pattern_kept(), mounted_at(containerd.socket.parent) as place:
        service = RecorderService(
            recorder_cri_socket=place / containerd.socket.name, recorder_core_off="label=no.core"
        )
        try:
            await service.start()
            yield service
        finally:
            service.close()


async def crash_in(
    recorder: RecorderService, containerd: Containerd, name: str, **labels: str
) -> CaptureRecord:
    """Have a container of the pod crash, and return the record."""
    identifier = await asyncio.to_thread(containerd.run, name, "/null_pointer", labels=labels)

    def found() -> CaptureRecord | None:
        for path in recorder.spool.iterdir() if recorder.spool.exists() else ():
            record = recorder.record(int(path.name)) if path.name.isdigit() else None
            container = record.process.container if record else None
            if container is not None and container.id == identifier:
                return record
        return None

    return await until(found, 20)


async def test_crash_in_a_pod_tells_pod_and_namespace(
    recorder: RecorderService, containerd: Containerd
) -> None:
    record = await crash_in(recorder, containerd, "web", tier="front", password="hunter2")

    assert len(record.files) == len(FILES)
    assert not any(file.truncated for file in record.files.values())
    container = record.process.container
    assert container is not None
    assert (container.name, container.image) == ("web", IMAGE)
    assert container.labels == POD | {"tier": "front", "password": REDACTED}
    assert record.process.ns_pid == 1
    (module,) = record.modules
    assert module.path == "/null_pointer"


async def test_label_in_a_pod_forbids_a_core(
    recorder: RecorderService, containerd: Containerd
) -> None:
    record = await crash_in(recorder, containerd, "secret", **{"no.core": "1"})

    assert not any(name.startswith("core") for name in record.files)
    assert "no core for label=no.core" in record.notes[0]


async def test_runtime_that_was_restarted_is_asked(
    recorder: RecorderService, containerd: Containerd
) -> None:
    before = containerd.socket.stat().st_mtime_ns
    await asyncio.to_thread(containerd.restart)
    assert containerd.socket.stat().st_mtime_ns != before  # another socket

    record = await crash_in(recorder, containerd, "again")

    assert record.process.container is not None
    assert record.process.container.name == "again"


async def test_recorder_that_asks_stays_small(
    recorder: RecorderService, containerd: Containerd
) -> None:
    for number in range(10):
        await crash_in(recorder, containerd, f"one-{number}")

    assert memory_of(recorder) < 150 * 1024 * 1024


UNKNOWN = Container(id="ab" * 32, runtime="containerd")


async def ask(path: Path) -> Container | None:
    asking = containers.Runtime(path, cri.tell)
    return await asyncio.to_thread(containers.answered, asking.ask(UNKNOWN), 5)


async def test_container_that_is_not_known(containerd: Containerd) -> None:
    assert await ask(containerd.socket) is None
    with pytest.raises(ValueError, match="NOT_FOUND"):
        await asyncio.to_thread(cri.tell, containerd.socket, UNKNOWN)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 4096, None])
async def test_socket_of_another_kind(
    says: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends, speaks another protocol, or is silent."""
    monkeypatch.setattr(containers, "ANSWER_WITHIN", 0.3)
    monkeypatch.chdir(tmp_path)  # a socket's path is bounded
    ended = threading.Event()

    def serve(listening: socket.socket) -> None:
        while not ended.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                if says is None:
                    ended.wait(10)
                else:
                    connection.sendall(says)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s")
        listening.listen()
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            assert await ask(Path("s")) is None
            with pytest.raises((TimeoutError, ValueError), match=r"UNAVAILABLE|DEADLINE|INTERNAL"):
                await asyncio.to_thread(cri.tell, Path("s"), UNKNOWN)
        finally:
            ended.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


async def test_runtime_that_is_away_is_not_asked_again_at_once(tmp_path: Path) -> None:
    asking = containers.Runtime(tmp_path / "none", cri.tell)
    assert await asyncio.to_thread(containers.answered, asking.ask(UNKNOWN), 5) is None

    assert asking.ask(UNKNOWN).done()
