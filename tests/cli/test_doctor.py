"""What doctor says of hosts that work and of hosts that do not."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from crashbus import Bus, connect, streams
from crashbus.cli import engine
from tests.cli.support import Result, crashbus
from tests.support.nats import NatsServer, SecuredNats, free_port
from tests.support.requirements import need_program, need_root
from tests.support.s3 import S3Server


def by_name(result: Result) -> dict[str, dict[str, Any]]:
    assert "Traceback" not in result.err
    return {one["name"]: one for one in map(json.loads, result.out.splitlines())}


async def doctor(*dest: str, env: Mapping[str, str]) -> tuple[Result, dict[str, dict[str, Any]]]:
    given = [part for url in dest for part in ("--dest", url)]
    result = await crashbus("doctor", "--json", *given, env=env)
    findings = by_name(result)
    assert result.status == (1 if any(not one["ok"] for one in findings.values()) else 0)
    assert all(one["mend"] for one in findings.values() if not one["ok"])
    return result, findings


async def test_everything_of_the_bus_is_found(nats_server: NatsServer, bus: Bus) -> None:
    _, found = await doctor(env={"CRASHBUS_NATS_URL": nats_server.url})
    assert found["nats"]["ok"]
    assert found["nats max_payload"]["ok"]
    assert found["jetstream"] == {
        "name": "jetstream",
        "ok": True,
        "detail": f"all {len(streams.all_streams(0))} streams are there",
        "mend": "",
    }


async def test_it_looks_at_kernel_and_core_pattern(nats_server: NatsServer) -> None:
    _, found = await doctor(env={"CRASHBUS_NATS_URL": nats_server.url})
    text = json.dumps(found)
    for part in ("kernel", "BTF", "bcc", "core_pattern", "drgn"):
        assert part in text
    assert found["jetstream"]["ok"]
    assert "a collector will make CRASH_CHUNKS" in found["jetstream"]["detail"]


async def test_backlog_that_the_kernel_makes_smaller_is_wrong() -> None:
    need_root()
    need_program("unshare")
    for allowed, ok in ((128, False), (4096, True)):
        in_network = f'echo {allowed} > /proc/sys/net/core/somaxconn && exec "$@"'
        done = await asyncio.to_thread(
            subprocess.run,
            [
                *("unshare", "--net", "sh", "-c", in_network, "sh"),
                *(sys.executable, "-m", "crashbus", "doctor", "--json"),
            ],
            env=os.environ | {"CRASHBUS_NATS_URL": "nats://127.0.0.1:1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = map(json.loads, done.stdout.splitlines())
        (found,) = [one for one in lines if one["name"] == "recorder: backlog"]
        assert found["ok"] is ok
        assert ok or ("somaxconn=128" in found["detail"] and "sysctl" in found["mend"])


async def test_no_server_is_wrong() -> None:
    result, found = await doctor(env={"CRASHBUS_NATS_URL": "nats://127.0.0.1:1"})
    assert result.status == 1
    assert not found["nats"]["ok"]
    assert "CRASHBUS_NATS_URL" in found["nats"]["mend"]
    for_people = await crashbus("doctor", env={"CRASHBUS_NATS_URL": "nats://127.0.0.1:1"})
    assert for_people.status == 1
    assert "WRONG  nats: no connection" in for_people.out
    assert "       mend: start nats-server" in for_people.out


async def test_a_server_without_jetstream_or_room_for_chunks_is_wrong(tmp_path: Path) -> None:
    server = NatsServer(tmp_path, "max_payload: 4096\n")
    config = tmp_path / "nats.conf"
    text = config.read_text()
    config.write_text(f"listen: 127.0.0.1:{server.port}\n" + text[text.index("max_payload") :])
    server.start()
    try:
        _, found = await doctor(env={"CRASHBUS_NATS_URL": server.url})
        assert found["nats"]["ok"]
        assert not found["jetstream"]["ok"]
        assert "-js" in found["jetstream"]["mend"]
        assert not found["nats max_payload"]["ok"]
    finally:
        server.stop()


async def test_a_server_that_wants_other_keys_is_wrong(tmp_path: Path) -> None:
    server = NatsServer(tmp_path, "authorization {\n  user: crash\n  password: right\n}\n")
    server.start()
    try:
        _, found = await doctor(env={"CRASHBUS_NATS_URL": server.url})
        assert not found["nats"]["ok"]
        assert "uthorization" in found["nats"]["detail"]
        assert "CRASHBUS_NATS_PASSWORD" in found["nats"]["mend"]
    finally:
        server.stop()


@pytest.mark.parametrize("variable", ["CRASHBUS_DESTINATIONS", "CRASHBUS_RECORDER_CAPTURES"])
async def test_a_wrong_setting_is_a_finding(variable: str) -> None:
    env = {"CRASHBUS_NATS_URL": "nats://127.0.0.1:1", variable: "ftp://nowhere"}
    result, found = await doctor(env=env)
    assert result.status == 1
    assert any(variable in one["detail"] for one in found.values() if not one["ok"])


async def test_destinations(nats_server: NatsServer, tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    open_port = server.sockets[0].getsockname()[1]
    closed_port = free_port()
    (tmp_path / "there").mkdir()
    urls = {
        f"file://{tmp_path}/there": True,
        f"file://{tmp_path}/not/yet": True,
        "file:///proc/no": False,
        f"tcp://127.0.0.1:{open_port}": True,
        f"tcp://127.0.0.1:{closed_port}": False,
        f"tls://127.0.0.1:{open_port}": False,
        "ftp://x": False,
    }
    async with server:
        _, found = await doctor(*urls, env={"CRASHBUS_NATS_URL": nats_server.url})
    assert {url: found[f"destination {url}"]["ok"] for url in urls} == urls
    assert not (tmp_path / "not").exists()  # it looks and makes nothing
    assert list((tmp_path / "there").iterdir()) == []


async def test_configured_destinations_are_looked_at(s3: S3Server) -> None:
    bucket = s3.make_bucket()
    env = {
        "CRASHBUS_NATS_URL": "nats://127.0.0.1:1",
        "CRASHBUS_DESTINATIONS": f"s3://{bucket}/x,s3://not-there-at-all",
        "CRASHBUS_SHIPPER_S3_CREATE_BUCKET": "true",
        **s3.settings(),
    }
    _, found = await doctor(env=env)
    assert found[f"destination s3://{bucket}/x"]["ok"]
    missing = found["destination s3://not-there-at-all"]
    assert not missing["ok"]
    assert "bucket" in missing["mend"]
    assert not s3.client().bucket_exists("not-there-at-all")
    _, found = await doctor(env={**env, "CRASHBUS_SHIPPER_S3_SECRET_KEY": "not-this-one"})
    wrong = found[f"destination s3://{bucket}/x"]
    assert not wrong["ok"]
    assert "not-this-one" not in json.dumps(found)


@pytest.mark.parametrize(("user", "said"), [("operator", "streams are there"), ("detector", "may")])
async def test_a_secured_bus_is_looked_at_with_our_key(
    tmp_path: Path, user: str, said: str
) -> None:
    server = SecuredNats(tmp_path)
    server.start()
    try:
        async with connect(**server.options("collector")) as bus:
            await bus.ensure_streams()
        _, found = await doctor(env=server.settings(user))
        assert found["nats"]["ok"]
        assert found["jetstream"]["ok"]
        assert said in found["jetstream"]["detail"]
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("name", "version", "kernel", "override"),
    [
        ("Docker", "20.10.24+dfsg1", "6.1.0-30-amd64", True),
        ("Docker", "27.3.1", "6.1.0-30-amd64", False),
        ("Docker", "27.3.1", "5.8.0-200-generic", True),
        ("Docker", "27.3.1", "5.9.0", False),
        ("Podman", "4.3.1", "6.1.0-30-amd64", False),
        ("Docker", "odd", "6.18", True),
    ],
)
def test_old_engines_and_kernels_get_the_override(
    name: str, version: str, kernel: str, override: bool
) -> None:
    assert ("compose.sysadmin.yaml" in engine.advice(name, version, kernel)) is override
