"""Delivery over TCP and TLS."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from crashbus import Bus
from services.shipper.destinations import lines
from tests.shipper.conftest import (
    MIB,
    Running,
    dead_letters,
    nothing_left,
    quick,
    receipts_of,
    send,
)
from tests.support.tcp import Certificates, Receiver, make_certificates, reassemble
from tests.support.wait import until

SAMPLES = Path(__file__).parent.parent / "support" / "samples"
SMALL = {"snapshot_1": b'{"Pid": 1}', "info_1": b"PID: 1", "backtrace_1": b"#0 a\n", "cfg_1": b"{}"}


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    listening = Receiver()
    yield listening
    listening.close()


@pytest.mark.parametrize("case", ["segv", "mt", "nginx_bus_master"])
async def test_samples_arrive_as_the_lines_of_the_daemon_over_one_connection(
    bus: Bus, shipping: Running, receiver: Receiver, case: str
) -> None:
    contents = {path.name: path.read_bytes() for path in (SAMPLES / case).iterdir()}
    sent = await send(bus, contents)
    await bus.publish(sent.item(receiver.url))

    async with shipping([receiver.url]):
        receipts = await receipts_of(bus, sent, len(contents))
        await nothing_left(bus)

    expected = b"".join(
        piece for name in sorted(contents) for piece in lines.small_file(name, contents[name])
    )
    assert receiver.received == [expected]
    assert receiver.accepted == 1
    assert {receipt.url for receipt in receipts} == {f"{receiver.url}#{name}" for name in contents}


async def test_core_goes_in_frames_that_a_receiver_can_check(
    bus: Bus, shipping: Running, receiver: Receiver
) -> None:
    url = f"{receiver.url}?core=true"
    sent = await send(bus, {"core_1": os.urandom(5 * MIB) + bytes(30 * MIB)})
    await bus.publish(sent.item(url))

    async with shipping([url]):
        await receipts_of(bus, sent, 1)

    assert reassemble(receiver.lines, "core_1") == sent.contents["core_1"]


async def test_core_where_none_is_wanted_is_a_dead_letter_and_small_files_go(
    bus: Bus, shipping: Running, receiver: Receiver
) -> None:
    sent = await send(bus, SMALL | {"core_1": b"core"})
    await bus.publish(sent.item(receiver.url))

    async with shipping([receiver.url]):
        receipts = await receipts_of(bus, sent, len(SMALL))
        (letter,) = await dead_letters(bus)

    assert letter.reason == "core_not_wanted"
    assert letter.work is not None
    assert [file.name for file in letter.work.files] == ["core_1"]
    assert {receipt.file.name for receipt in receipts} == set(SMALL)
    assert len(receiver.lines) == len(SMALL)


async def test_damaged_small_file_does_not_keep_back_the_others(
    bus: Bus, shipping: Running, receiver: Receiver
) -> None:
    sent = await send(bus, SMALL)
    files = tuple(
        file.model_copy(update={"sha256": "0" * 64}) if file.name == "info_1" else file
        for file in sent.files
    )
    await bus.publish(sent.item(receiver.url, files=files))

    async with shipping([receiver.url]):
        await receipts_of(bus, sent, len(SMALL) - 1)
        (letter,) = await dead_letters(bus)

    assert letter.reason == "damaged_file"
    assert len(receiver.received) == 1
    assert not any(b"info_1" in line for line in receiver.lines)


async def test_damaged_core_never_gets_its_last_line(
    bus: Bus, shipping: Running, receiver: Receiver
) -> None:
    url = f"{receiver.url}?core=true"
    sent = await send(bus, {"core_1": os.urandom(3 * MIB)})
    claimed = sent.files[0].model_copy(update={"sha256": "0" * 64})
    await bus.publish(sent.item(url, files=(claimed,)))

    async with shipping([url]):
        (letter,) = await dead_letters(bus)
        await until(lambda: receiver.received)

    assert letter.reason == "damaged_file"
    assert not any(b"complete" in line for line in receiver.lines)


async def test_receiver_that_resets_gets_everything_once_it_works(
    bus: Bus, shipping: Running, receiver: Receiver
) -> None:
    receiver.reset_after = 10
    sent = await send(bus, SMALL)
    await bus.publish(sent.item(receiver.url))

    async with shipping([receiver.url]) as health:
        faults = await until(health.faults)
        assert receiver.url in str(faults)
        receiver.reset_after = None
        receipts = await receipts_of(bus, sent, len(SMALL))

    assert all(receipt.attempts > 1 for receipt in receipts)
    assert len(receiver.lines) == len(SMALL)


async def test_receiver_that_does_not_read_is_not_taken_for_one_that_has_it(
    bus: Bus, shipping: Running
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = f"tcp://127.0.0.1:{silent.getsockname()[1]}?core=true"
        sent = await send(bus, {"core_1": os.urandom(8 * MIB)})
        await bus.publish(sent.item(url))

        async with shipping([url], quick(tcp_write_timeout=0.3, retry_in_hand=0, give_up=0.1)):
            (letter,) = await dead_letters(bus)

    assert letter.reason == "timeout"


async def test_receiver_that_never_closes_has_nothing_delivered(
    bus: Bus, shipping: Running
) -> None:
    receiver = Receiver(stays_open=True)
    sent = await send(bus, SMALL)
    await bus.publish(sent.item(receiver.url))

    settings = quick(tcp_close_timeout=0.2, retry_in_hand=0, give_up=0.1)
    async with shipping([receiver.url], settings):
        (letter,) = await dead_letters(bus)
    receiver.close()

    assert letter.reason == "not_closed"
    assert "CRASHBUS_SHIPPER_TCP_AWAIT_CLOSE" in letter.mend


@pytest.mark.parametrize("tls", [False, True])
async def test_receiver_that_never_closes_but_took_everything_is_enough_where_that_is_set(
    bus: Bus, shipping: Running, certificates: Certificates, tls: bool
) -> None:
    receiver = Receiver(certificates if tls else None, stays_open=True)
    sent = await send(bus, SMALL)
    await bus.publish(sent.item(receiver.url))

    settings = quick(tcp_close_timeout=0.2, tcp_await_close=False, tls_verify=False)
    async with shipping([receiver.url], settings):
        await receipts_of(bus, sent, len(SMALL))
    receiver.close()

    assert len(receiver.lines) == len(SMALL)


async def test_tls_receiver_with_a_known_ca_gets_everything(
    bus: Bus, shipping: Running, certificates: Certificates
) -> None:
    receiver = Receiver(certificates)
    url = f"{receiver.url}?core=true"
    sent = await send(bus, SMALL | {"core_1": os.urandom(2 * MIB)})
    await bus.publish(sent.item(url))

    settings = quick(tls_ca_file=certificates.ca, tls_server_name=certificates.name)
    async with shipping([url], settings):
        receipts = await receipts_of(bus, sent, len(SMALL) + 1)
    receiver.close()

    assert receipts[0].url.startswith("tls://")
    assert receiver.accepted == 1
    assert reassemble(receiver.lines[len(SMALL) :], "core_1") == sent.contents["core_1"]


@pytest.mark.parametrize("settings", [{}, {"tls_server_name": "other.test"}])
async def test_tls_receiver_with_a_wrong_certificate_gets_nothing(
    bus: Bus, shipping: Running, certificates: Certificates, settings: dict[str, object]
) -> None:
    receiver = Receiver(certificates)
    sent = await send(bus, SMALL)
    await bus.publish(sent.item(receiver.url))
    if settings:
        settings = settings | {"tls_ca_file": certificates.ca}

    async with shipping([receiver.url], quick(**settings)):
        (letter,) = await dead_letters(bus)
    receiver.close()

    assert letter.reason == "certificate_rejected"
    assert "CRASHBUS_SHIPPER_TLS_CA_FILE" in letter.mend
    assert receiver.received == []


async def test_unchecked_tls_receiver_gets_everything_where_that_is_set(
    bus: Bus, shipping: Running, certificates: Certificates
) -> None:
    receiver = Receiver(certificates)
    sent = await send(bus, SMALL)
    await bus.publish(sent.item(receiver.url))

    async with shipping([receiver.url], quick(tls_verify=False)):
        await receipts_of(bus, sent, len(SMALL))
    receiver.close()

    assert len(receiver.lines) == len(SMALL)


async def test_unreachable_receiver_gets_everything_when_it_is_there(
    bus: Bus, shipping: Running, receiver: Receiver
) -> None:
    receiver.close()
    sent = await send(bus, SMALL)
    await bus.publish(sent.item(receiver.url))

    async with shipping([receiver.url], quick(retry_in_hand=0.2)) as health:
        faults = await until(health.faults)
        assert "start the receiver" in str(faults)
        back = Receiver(port=receiver.port)
        await receipts_of(bus, sent, len(SMALL))
    back.close()

    assert len(back.lines) == len(SMALL)


async def test_small_files_beyond_any_reason_are_a_dead_letter(
    bus: Bus, shipping: Running, receiver: Receiver
) -> None:
    sent = await send(bus, {"backtrace_1": bytes(17 * MIB), "info_1": b"x"})
    await bus.publish(sent.item(receiver.url))

    async with shipping([receiver.url]):
        (letter,) = await dead_letters(bus)
        await receipts_of(bus, sent, 1)

    assert letter.reason == "file_too_large"
    assert receiver.lines == [b'{"info_1":["x"]}']
