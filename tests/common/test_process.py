"""What a process wrote of itself is bounded, however it wrote it."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from crashbus import Bus, SignalEvent
from crashbus.identity import boot_id
from crashbus.parts import Container
from services.common import process
from tests.cli.support import make
from tests.support.wait import until


def size(arguments: tuple[str, ...]) -> int:
    return sum(len(one.encode()) for one in arguments)


def test_arguments_that_are_no_text_are_cut_to_the_first_64_kib() -> None:
    raw = b"first\0" + b"\0".join(b"\xff" * 4096 for _ in range(64)) + b"\0"
    arguments = process.split_arguments(raw)
    assert arguments[0] == "first"
    assert arguments[1] == "\\xff" * 1024
    assert size(arguments) == 64 * 1024


def test_a_character_at_the_cut_is_left_out_whole() -> None:
    # One byte first, so that the cut falls inside a character of three.
    raw = b"\0".join([b"x", *("\u20ac".encode() * 1365 for _ in range(60))])
    arguments = process.split_arguments(raw)
    assert set("".join(arguments[1:])) == {"\u20ac"}
    assert 64 * 1024 - 3 <= size(arguments) <= 64 * 1024


def test_arguments_within_the_bound_are_all_kept() -> None:
    assert process.split_arguments(b"a\0\0b c\0") == ("a", "", "b c")
    assert process.split_arguments(b"") == ()


@pytest.mark.parametrize("before", range(4096 - 22, 4096 - 14))
def test_secret_that_does_not_fit_does_not_come_through_in_part(before: int) -> None:
    raw = b"x" * before + b" postgres://me:S3cret@db \0"
    (shown,) = process.split_arguments(raw)
    assert "S" not in shown
    assert len(shown) == 4096


def test_arguments_that_the_kernel_cut_show_no_beginning_of_a_secret() -> None:
    assert process.split_arguments(b"x\0postgres://me:S3cr", is_cut=True)[1] == (
        "postgres://<redacted>"
    )
    whole = b"postgres://me:S3cr\0" + b"\0".join([b"x"] * 64)
    assert process.split_arguments(whole, is_cut=True)[0] == "postgres://me:S3cr"


def test_of_a_long_argument_no_more_is_looked_at_than_can_be_shown() -> None:
    raw = b"postgres://me:" + b"S3cret" * 2000 + b"@db\0--next\0"
    assert process.split_arguments(raw) == ("postgres://<redacted>", "--next")


def test_names_cannot_make_fields_of_their_own() -> None:
    status = process.status_in("Name:\tx\rUid:\t0\x85Gid:\t0\nPid:\t7\n".encode())
    assert status == {"Name": "x\rUid:\t0\x85Gid:\t0", "Pid": "7"}
    assert process.cgroup_in(b"0::/a\r1:x:/a/much/longer/one\n") == "/a\r1:x:/a/much/longer/one"


@pytest.fixture
async def odd_process(tmp_path: Path) -> AsyncIterator[int]:
    """A living process whose path and arguments are long and not UTF-8."""
    directory = os.fsencode(tmp_path)
    for _ in range(14):
        directory += b"/" + b"\xfe" * 250
    os.makedirs(directory)  # noqa: PTH103 - a Path would be text
    program = directory + b"/sh"
    shutil.copy(b"/bin/sh", program)
    arguments = [b"\xff" * 4096] * 62
    child = await asyncio.create_subprocess_exec(program, "-c", "read x", *arguments, stdin=-1)
    yield child.pid
    child.kill()
    await child.wait()


async def test_a_process_of_odd_bytes_fits_a_message(odd_process: int, bus: Bus) -> None:
    await until(lambda: len(process.command_line(odd_process)) > 3)
    seen = process.read_process(odd_process, boot_id())
    assert seen.executable is not None
    assert seen.executable.endswith("/sh")
    assert len(seen.executable) > 14 * 250 * 4
    event = make().event.model_copy(update={"process": seen})
    assert len(event.encode()) < 128 * 1024
    await bus.publish(event)
    assert await bus.stored(SignalEvent) == [event]


def test_a_longer_path_than_a_message_holds_is_cut() -> None:
    group = process.cgroup_in(b"0::/" + b"\xff" * 100_000 + b"\n")
    assert group is not None
    assert len(group) == 32 * 1024


ID, OTHER = "0a" * 32, "ff" * 32
POD = "pod0c1b2a39_1111_2222_3333_444455556666"


@pytest.mark.parametrize(
    ("group", "runtime"),
    [
        (f"/system.slice/docker-{ID}.scope", "docker"),
        (f"/docker/{ID}", "docker"),
        (f"/kubepods.slice/kubepods-{POD}.slice/docker-{ID}.scope", "docker"),
        (
            "/kubepods.slice/kubepods-burstable.slice/"
            f"kubepods-burstable-{POD}.slice/cri-containerd-{ID}.scope",
            "containerd",
        ),
        (
            f"/system.slice/containerd.service/kubepods-{POD}.slice:cri-containerd:{ID}",
            "containerd",
        ),
        (f"/kubepods.slice/kubepods-besteffort-{POD}.slice/crio-{ID}.scope", "crio"),
        (f"/kubepods/besteffort/{POD}/crio-{ID}", "crio"),
        (f"/kubepods/burstable/{POD}/{ID}", "unknown"),  # cgroupfs: any of them does that
        (f"/machine.slice/libpod-{ID}.scope/container", "podman"),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope", "podman"),
        # A container in a container, or what the outer one's root made to look like it.
        (
            f"/docker/{ID}/kubelet.slice/kubelet-{POD}.slice/cri-containerd-{OTHER}.scope",
            "docker",
        ),
        (f"/machine.slice/libpod-{ID}.scope/docker/{OTHER}", "podman"),
        (f"/kubepods/burstable/{POD}/{ID}/docker/{OTHER}", "unknown"),
    ],
)
def test_runtime_is_known_by_its_cgroups(group: str, runtime: str) -> None:
    assert process.container_of(group) == Container(id=ID, runtime=runtime)
    assert process.cgroup_in(f"3:pids:/x\n0::{group}\n".encode()) == group  # the pod's UID with it


@pytest.mark.parametrize("group", [None, "/", "/system.slice/docker.service", f"/docker/{ID[1:]}"])
def test_cgroup_that_is_no_container_s(group: str | None) -> None:
    assert process.container_of(group) is None
