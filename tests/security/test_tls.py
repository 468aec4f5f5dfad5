"""TLS to the bus: checked, never left out, and the connection comes back."""

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from crashbus import connect
from crashbus.errors import BusUnreachable
from crashbus.keys import SEED, make_keys
from services.common import certificate
from services.common.bus_settings import BusSettings
from services.common.health import Health
from services.common.service import Runtime
from tests.cli.support import crashbus
from tests.support.nats import DEPLOY, NatsServer, SecuredNats
from tests.support.requirements import need_program, need_root
from tests.support.wait import until

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


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
    tries: tuple[tuple[str, dict[str, Any]], ...] = (
        (f"tls://127.0.0.1:{nats_server.port}", {}),
        (nats_server.url, {"tls": ssl.create_default_context()}),
    )
    for url, options in tries:
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


async def test_a_ca_is_replaced_while_clients_of_the_old_one_are_there(
    secured: SecuredNats,
) -> None:
    of_old_ca = ssl.create_default_context(cafile=secured.keys / "ca.pem")
    make_certificates(secured.keys, NEW_CA="yes")
    handed_out = ssl.create_default_context(cafile=secured.keys / "ca.pem")

    for tls in (of_old_ca, handed_out):  # the server still shows what it had
        async with connect(**secured.options("operator") | {"tls": tls}):
            pass
    make_certificates(secured.keys)
    secured.reload()

    async def refused() -> bool:
        try:
            async with connect(**secured.options("operator") | {"tls": of_old_ca}):
                return False
        except BusUnreachable as error:
            return "CERTIFICATE_VERIFY_FAILED" in str(error)

    await until(refused)
    async with connect(**secured.options("operator") | {"tls": handed_out}):
        pass
    # What the documentation says at last: the old one is not trusted any more.
    command = "openssl x509 -in ca.pem -out ca.new && mv ca.new ca.pem"
    assert f"`{command}`" in OPERATIONS.read_text()
    subprocess.run(command, shell=True, check=True, cwd=secured.keys)
    assert len(ssl.create_default_context(cafile=secured.keys / "ca.pem").get_ca_certs()) == 1
    async with connect(**secured.options("operator")):
        pass


def make_certificates(keys: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command, given = [str(DEPLOY / "make-certificates.sh"), str(keys)], os.environ | environment
    return subprocess.run(command, env=given, capture_output=True, text=True)


def test_no_certificate_is_made_that_outlives_its_ca(tmp_path: Path) -> None:
    need_program("openssl")
    (tmp_path / "server").mkdir()
    assert make_certificates(tmp_path, CA_DAYS="30", DAYS="20").returncode == 0
    made = (tmp_path / "server" / "tls.pem").read_bytes()

    done = make_certificates(tmp_path)

    assert done.returncode == 1
    assert "NEW_CA=yes" in done.stderr
    assert (tmp_path / "server" / "tls.pem").read_bytes() == made
    make_certificates(tmp_path, NEW_CA="yes")
    assert make_certificates(tmp_path).returncode == 0


def test_no_ca_takes_the_place_of_one_whose_key_is_elsewhere(tmp_path: Path) -> None:
    need_program("openssl")
    (tmp_path / "server").mkdir()
    make_certificates(tmp_path)
    (tmp_path / "ca.key").unlink()
    known = (tmp_path / "ca.pem").read_bytes()

    done = make_certificates(tmp_path)

    assert done.returncode == 1
    assert "ca.key is not" in done.stderr
    assert (tmp_path / "ca.pem").read_bytes() == known


def test_new_ca_whose_making_was_broken_off_is_made_whole_by_the_next_run(tmp_path: Path) -> None:
    need_program("openssl")
    (tmp_path / "server").mkdir()
    make_certificates(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "mv").write_text('#!/bin/sh\n[ "$1" != ca.pem.new ] && exec /bin/mv "$@"\n')
    (programs / "mv").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    assert make_certificates(tmp_path, NEW_CA="yes", PATH=path).returncode == 1

    done = make_certificates(tmp_path)

    assert done.returncode == 0, done.stderr
    command = ["openssl", "verify", "-CAfile", "ca.pem", "server/tls.pem"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "ca.pem").read_text().count("BEGIN CERTIFICATE") == 2


def test_what_openssl_says_is_told_when_it_fails(tmp_path: Path) -> None:
    need_program("openssl")
    (tmp_path / "server").mkdir()
    make_certificates(tmp_path)
    (tmp_path / "ca.key").write_text("no key")

    done = make_certificates(tmp_path)

    assert done.returncode == 1
    assert "ca.key" in done.stderr


def test_renewed_certificate_is_where_the_server_sees_it(tmp_path: Path) -> None:
    """As in a container; whoever renews it has not to know the path there."""
    need_program("openssl")
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "tls.conf").write_text("# no TLS\n")  # as make_keys leaves it
    make_certificates(tmp_path, SEEN_AT="/etc/nats/keys")
    seen = (tmp_path / "server" / "tls.conf").read_text()

    done = make_certificates(tmp_path)

    assert '"/etc/nats/keys/server/tls.pem"' in seen
    assert (tmp_path / "server" / "tls.conf").read_text() == seen
    assert "tls.conf stays" in done.stdout


async def test_service_and_doctor_tell_when_the_certificate_ends(
    secured: SecuredNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in secured.settings("operator").items():
        monkeypatch.setenv(name, value)
    async with Runtime("detector", BusSettings.load(), Health()).bus():
        end = REGISTRY.get_sample_value("crashbus_bus_certificate_end_seconds")
    assert end == pytest.approx(time.time() + 365 * 86400, abs=3600)
    assert (await seen_by_doctor(secured))["ok"]

    make_certificates(secured.keys, DAYS="20")
    secured.reload()

    async def ends_soon() -> dict[str, str] | None:
        found = await seen_by_doctor(secured)
        return None if found["ok"] else found

    assert "make-certificates.sh" in (await until(ends_soon))["mend"]


async def test_service_tells_of_a_renewed_certificate_without_being_started_anew(
    secured: SecuredNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certificates(secured.keys, DAYS="20")
    secured.stop()
    secured.start()
    for name, value in secured.settings("collector").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(certificate, "LOOK_EVERY", 0.05)
    async with Runtime("collector", BusSettings.load(), Health()).bus(makes_streams=True) as bus:
        first = bus.certificate_end or 0
        await until(lambda: connections(secured) > 3)  # looks that found nothing newer
        assert bus._client.stats["reconnects"] == 0

        make_certificates(secured.keys)
        secured.reload()

        await until(lambda: (bus.certificate_end or 0) > first + 300 * 86400)
        await until(lambda: bus.is_connected)
        assert bus._client.stats["reconnects"] == 1
        assert not await bus.ensure_streams()


def connections(secured: SecuredNats) -> int:
    """Return how many there have been."""
    with urllib.request.urlopen(f"{secured.monitor}/varz", timeout=5) as answer:
        return int(json.load(answer)["total_connections"])


async def seen_by_doctor(secured: SecuredNats) -> dict[str, str]:
    result = await crashbus("doctor", "--json", env=secured.settings("operator"))
    findings = map(json.loads, result.out.splitlines())
    return next(one for one in findings if one["name"] == "nats certificate")


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
