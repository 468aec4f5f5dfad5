"""TLS to the bus: checked, never left out, and the connection comes back."""

import asyncio
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from crashbus import connect
from crashbus.errors import BusUnreachable
from crashbus.keys import SEED, make_keys
from tests.cli.support import crashbus
from tests.support.nats import NatsServer, SecuredNats
from tests.support.requirements import need_program, need_root
from tests.support.wait import until


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[SecuredNats]:
    need_program("nats-server")
    need_program("openssl")
    server = SecuredNats(tmp_path)
    server.start()
    yield server
    server.stop()


async def test_the_command_speaks_to_a_secured_bus_by_its_settings(secured: SecuredNats) -> None:
    async with connect(**secured.options("collector")) as bus:
        await bus.ensure_streams()
    result = await crashbus("ls", env=secured.settings("operator"))
    assert (result.status, result.err) == (0, "no crashes\n")
    # One who may only listen can list, too.
    result = await crashbus("ls", env=secured.settings("consumer"))
    assert (result.status, result.err) == (0, "no crashes\n")


async def test_a_server_of_another_ca_is_refused(secured: SecuredNats) -> None:
    options = secured.options("operator") | {"tls": ssl.create_default_context()}
    with pytest.raises(BusUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
        async with connect(**options):
            pass


async def test_nothing_is_said_to_a_server_without_tls(nats_server: NatsServer) -> None:
    for url, options in (
        (f"tls://127.0.0.1:{nats_server.port}", {}),
        (nats_server.url, {"tls": ssl.create_default_context()}),
    ):
        with pytest.raises(BusUnreachable, match="the server offers none"):
            async with connect(url, user="someone", password="secret", **options):
                pass


async def test_the_connection_comes_back_after_its_key_was_taken_and_given_again(
    secured: SecuredNats, tmp_path: Path
) -> None:
    users = secured.keys / "server" / "users.conf"
    known = users.read_text()
    async with connect(**secured.options("operator")) as bus:
        make_keys(tmp_path / "others")
        shutil.copy(tmp_path / "others" / "server" / "users.conf", users)
        secured.reload()
        await until(lambda: not bus.is_connected)
        users.write_text(known)
        secured.reload()
        await until(lambda: bus.is_connected)
        await asyncio.wait_for(bus.ensure_streams(), 60)


async def test_a_connection_ends_also_when_its_server_wants_tls_now(
    secured: SecuredNats, tmp_path: Path
) -> None:
    secured.stop()
    (tmp_path / "plain").mkdir()
    plain = NatsServer(tmp_path / "plain", port=secured.port)
    plain.start()
    failures: list[Exception] = []

    async def note(error: Exception) -> None:
        failures.append(error)

    async with asyncio.timeout(60):
        async with connect(plain.url, error_cb=note) as bus:
            plain.stop()
            await until(lambda: not bus.is_connected)
            secured.start()
            # It failed to speak TLS, and waits before it tries again.
            await until(lambda: any(isinstance(one, ssl.SSLError) for one in failures))


def test_keys_that_are_there_stay(tmp_path: Path) -> None:
    first = make_keys(tmp_path)
    (tmp_path / "shipper" / SEED).unlink()
    second = make_keys(tmp_path)
    assert {user for user, key in first.items() if second[user] != key} == {"shipper"}
    assert all(key in (tmp_path / "server" / "users.conf").read_text() for key in second.values())
    for user in first:
        assert (tmp_path / user / SEED).stat().st_mode & 0o777 == 0o400


def test_a_key_belongs_to_the_owner_of_its_directory(tmp_path: Path) -> None:
    need_root()  # only root gives files away
    make_keys(tmp_path, {"shipper": 12345})
    (tmp_path / "shipper" / SEED).unlink()
    make_keys(tmp_path)
    assert (tmp_path / "shipper").stat().st_uid == 12345
    assert (tmp_path / "shipper" / SEED).stat().st_uid == 12345
    assert (tmp_path / "recorder" / SEED).stat().st_uid == 0
