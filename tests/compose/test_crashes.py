"""Crashes of containers of all kinds arrive in a real S3 store and in a volume."""

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from crashbus import Bus
from crashbus.layout import Kind
from crashbus.messages import SignalEvent
from tests.compose.delivery import (
    WHOLE,
    WITHIN,
    check_contents,
    delivered,
    manifest_of,
    one_of,
)
from tests.compose.stack import NGINX, Stack
from tests.support.docker import IMAGE, child_of
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="package")

KINDS: list[tuple[str, ...]] = [
    ("--rm", IMAGE, "/null_pointer"),  # the image holds crashers and nothing else
    ("--read-only", IMAGE, "/null_pointer"),
    ("--tmpfs", "/tmp", "--user", "1234:5678", IMAGE, "/null_pointer"),
    ("--cap-drop", "ALL", "--memory", "32m", IMAGE, "/threads"),
    (
        *("--rm", "--security-opt", "seccomp=unconfined", "--entrypoint", "unshare", NGINX),
        *("--user", "--map-root-user", "--fork", "sh", "-c", "kill -SEGV $$"),
    ),
]
NAMES = ["rm-and-no-tmp", "read-only", "tmpfs-and-user", "limits", "user-namespace"]


@pytest.mark.parametrize("arguments", KINDS, ids=NAMES)
async def test_crash_in_a_container_is_delivered_whole(
    stack: Stack, bus: Bus, arguments: tuple[str, ...]
) -> None:
    container = await asyncio.to_thread(stack.engine.run, *arguments)

    manifest, receipts = await delivered(stack, bus, container)

    assert {file.kind for file in manifest.files} >= WHOLE
    assert not any(file.truncated for file in manifest.files)
    files = await asyncio.to_thread(check_contents, stack, receipts)
    shown = json.loads(one_of(files, r"snapshot_\d+"))["Container"]
    assert shown["Id"] == container
    assert shown["Image"] in (IMAGE, NGINX)
    assert shown["Name"]
    if IMAGE in arguments:
        frames = json.loads(one_of(files, r"backtrace_\d+\.json"))["threads"][0]["frames"]
        assert frames[0]["symbol"] == "crash_here"
    events = [e for e in await bus.stored(SignalEvent) if e.crash_id == manifest.crash_id]
    assert [event.signal_name for event in events] == ["SIGSEGV"]


async def test_walkthrough(stack: Stack, bus: Bus) -> None:
    """As AppScope's users know it: nginx in a container, its master hit from the host."""
    await asyncio.to_thread(stack.compose, "up", "--detach", "--no-deps", "walkthrough")
    (container,) = stack.containers("walkthrough")
    master = await child_of(stack.pid(container))
    # Before that it is not nginx yet.
    await until(lambda: b"master" in Path(f"/proc/{master}/cmdline").read_bytes())

    os.kill(master, signal.SIGBUS)

    manifest, receipts = await delivered(stack, bus, container)
    assert (manifest.process.pid, manifest.signal_name) == (master, "SIGBUS")
    files = await asyncio.to_thread(check_contents, stack, receipts)
    container_shown = json.loads(one_of(files, r"snapshot_\d+"))["Container"]
    assert container_shown["Name"] == "crashbus-walkthrough-1"
    assert container_shown["Image"] == NGINX
    assert b"ngx_master_process_cycle" in one_of(files, r"backtrace_\d+")
    (event,) = [e for e in await bus.stored(SignalEvent) if e.process.pid == master]
    assert event.crash_id == manifest.crash_id
    # Else it would stay when everything else is stopped, as nobody starts it from there.
    await asyncio.to_thread(stack.compose, "rm", "--force", "--stop", "walkthrough")


async def test_files_of_appscope_are_brought_out_of_a_container(stack: Stack, bus: Bus) -> None:
    """Its library wrote them under the container's own root, which is gone with its end."""
    run = ("--rm", "--user", "1234:5678", "--tmpfs", "/tmp/appscope:mode=1777")
    container = await asyncio.to_thread(stack.engine.run, *run, IMAGE, "/libscope.so")

    async def both_cores() -> bool:
        manifest = await manifest_of(bus, container)
        return [file.kind for file in manifest.files].count(Kind.CORE) == 2

    await until(both_cores, WITHIN, every=0.2)
    _, receipts = await delivered(stack, bus, container)
    files = await asyncio.to_thread(check_contents, stack, receipts)
    assert any(content.startswith(b"Scope Version: v1.4.3") for content in files.values())


async def test_command_shows_and_fetches_what_was_delivered(stack: Stack, bus: Bus) -> None:
    container = await asyncio.to_thread(stack.engine.run, "--rm", IMAGE, "/null_pointer")
    manifest, _ = await delivered(stack, bus, container)

    rows = (await asyncio.to_thread(stack.command, "ls", "--json")).splitlines()

    (row,) = [row for row in map(json.loads, rows) if row["crash_id"] == manifest.crash_id]
    assert row["state"] == "delivered"
    shown = await asyncio.to_thread(stack.command, "show", "--json", manifest.crash_id)
    (backtrace,) = json.loads(shown)["backtraces"].values()
    assert "crash_here" in backtrace
    await asyncio.to_thread(stack.command, "get", manifest.crash_id, "core")
    (core,) = (stack.clone / "deploy" / "fetched" / manifest.crash_id).iterdir()
    assert core.read_bytes().startswith(b"\x7fELF")


async def test_snapshot_of_a_living_process_is_delivered(stack: Stack, bus: Bus) -> None:
    container = await asyncio.to_thread(stack.engine.run, "--detach", IMAGE, "/waiting")
    pid = str(stack.pid(container))

    command = ("exec", "-T", "recorder", "crashbus", "snapshot", pid)
    told = await asyncio.to_thread(stack.compose, *command)

    manifest, _ = await delivered(stack, bus, container)
    assert manifest.crash_id in told
    assert stack.pid(container)  # it lives on
    stack.docker("rm", "--force", container)
