"""What each container of the compose file may do, what it is told, and how large its image is."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from crashbus import Bus, Manifest, connect
from crashbus.errors import CrashbusError
from crashbus.keys import USERS
from tests.compose.delivery import decompressed
from tests.compose.stack import BASE_IMAGE, ROOT, Stack

pytestmark = pytest.mark.asyncio(loop_scope="package")

SERVICES = ("nats", "detector", "recorder", "guard", "collector", "shipper", "storage")
CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "DAC_READ_SEARCH": 2,
    "FOWNER": 3,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "SYSLOG": 34,
    "PERFMON": 38,
    "BPF": 39,
    "CHECKPOINT_RESTORE": 40,
}
ROOT_SERVICES = {"detector", "recorder", "guard", "collector"}


@pytest.mark.parametrize("service", SERVICES)
async def test_service_has_the_user_and_the_capabilities_that_are_written_down(
    stack: Stack, service: str
) -> None:
    configured = json.loads(stack.compose("config", "--format", "json"))["services"][service]
    for container in stack.containers(service):
        status = Path(f"/proc/{stack.pid(container)}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert set(fields["Uid"].split()) == {"0" if service in ROOT_SERVICES else "10001"}
        allowed = sum(1 << CAPABILITIES[name] for name in configured.get("cap_add", ()))
        assert int(fields["CapBnd"], 16) == allowed
        assert int(fields["CapEff"], 16) == (allowed if service in ROOT_SERVICES else 0)
        assert fields["NoNewPrivs"] == "1"
        shown = stack.inspect(container)["HostConfig"]
        assert isinstance(shown, dict)
        assert shown["ReadonlyRootfs"] and not shown["Privileged"]


STORE_KEYS = {"/run/secrets/s3_access_key", "/run/secrets/s3_secret_key"}
GIVEN = {
    "nats": {"/etc/nats/keys/server"},
    "shipper": STORE_KEYS | {"/run/keys"},
    "storage": STORE_KEYS,
}


async def test_shipper_and_store_have_nothing_of_the_host(stack: Stack) -> None:
    for service in GIVEN:
        for container in stack.containers(service):
            mounts = stack.inspect(container)["Mounts"]
            assert isinstance(mounts, list)
            binds = {one["Destination"] for one in mounts if one["Type"] == "bind"}
            assert binds == GIVEN[service]


async def test_bus_knows_nobody_without_a_key(stack: Stack) -> None:
    with pytest.raises(CrashbusError):
        async with connect(stack.bus_url) as nobody:
            await nobody.stored(Manifest)


async def test_whoever_listens_from_the_host_hears_of_crashes_with_the_consumers_key(
    stack: Stack, bus: Bus
) -> None:
    async with connect(stack.bus_url, nkeys_seed=str(stack.seed("consumer"))) as listener:
        assert {one.crash_id for one in await listener.stored(Manifest)} == {
            one.crash_id for one in await bus.stored(Manifest)
        }


async def test_no_secret_is_shown_anywhere(stack: Stack) -> None:
    inspected = [stack.docker("inspect", c) for s in SERVICES for c in stack.containers(s)]
    images = [
        stack.docker("image", "history", "--no-trunc", f"crashbus/{s}:0.1.0")
        for s in SERVICES
        if s != "guard"
    ]
    told = "\n".join([*inspected, *images, stack.logs()]).encode()
    kept = await asyncio.to_thread(stack.bucket)
    files = [decompressed(raw) if name.endswith(".zst") else raw for name, raw in kept.items()]
    assert files
    secrets = stack.store_keys()
    secrets += [stack.seed(user).read_text().strip() for user in USERS]
    for secret in map(str.encode, secrets):
        assert not [True for content in (told, *files) if secret in content]


# Hashed names of those that OpenSSL looks for, c_rehash(1).
_TRUSTED = """
import pathlib, ssl
print(len(list(pathlib.Path(ssl.get_default_verify_paths().capath).glob("*.0"))))
"""


@pytest.mark.parametrize("service", ["detector", "recorder", "collector", "shipper"])
async def test_image_says_what_it_is_and_trusts_the_usual_cas(stack: Stack, service: str) -> None:
    (container, *_) = stack.containers(service)
    image = stack.inspect(container)["Config"]
    assert isinstance(image, dict)

    trusted = stack.docker("exec", container, "/opt/crashbus/bin/python", "-I", "-c", _TRUSTED)

    assert int(trusted) > 100
    assert image["Labels"]["org.opencontainers.image.title"] == f"Crashbus {service}"
    assert image["Labels"]["org.opencontainers.image.licenses"]


LIMITS = {"shipper": 120, "collector": 120, "recorder": 155, "detector": 450}  # MB
SIZES = re.compile(r"^\| (\w+) \| (\d+) \| \d+ \| \d+ \|$", re.MULTILINE)


async def test_images_add_to_their_base_what_the_documentation_says(stack: Stack) -> None:
    told = dict(SIZES.findall((ROOT / "docs" / "operations.md").read_text()))

    def size(image: str) -> int:
        return int(stack.docker("image", "inspect", "--format", "{{.Size}}", image))

    added = {
        service: (size(f"crashbus/{service}:0.1.0") - size(BASE_IMAGE)) / 1e6 for service in told
    }

    assert set(LIMITS) <= set(told)
    for service, megabytes in added.items():
        assert megabytes < LIMITS.get(service, 120)
        assert megabytes == pytest.approx(int(told[service]), rel=0.1), added
