"""What a process had in use, from the real /proc and from tables made by hand."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from services.common import resources
from services.common.proc import Remembered
from services.common.resources import Resources
from tests.support.cgroup import cgroup_path, limit, memory_cgroup


def test_open_files_and_sockets_of_this_process(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with (
        path.open("w") as file,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as local,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink,
    ):
        datagrams.bind(("::1", 0))
        local.bind(str(tmp_path / "local"))

        shown = resources.describe(resources.read(os.getpid(), None))

        by_descriptor = {one["Fd"]: one for one in shown["Sockets"]}
        port, mine = server.getsockname()[1], client.getsockname()[1]
        assert {"Fd": file.fileno(), "Target": str(path)} in shown["OpenFiles"]
        assert by_descriptor[server.fileno()] == {
            "Fd": server.fileno(),
            "Family": "AF_INET",
            "Type": "SOCK_STREAM",
            "Local": f"127.0.0.1:{port}",
            "Remote": None,
            "State": "LISTEN",
        }
        assert by_descriptor[client.fileno()]["Remote"] == f"127.0.0.1:{port}"
        assert by_descriptor[client.fileno()]["Local"] == f"127.0.0.1:{mine}"
        assert by_descriptor[client.fileno()]["State"] == "ESTABLISHED"
        assert by_descriptor[datagrams.fileno()]["Local"] == f"[::1]:{datagrams.getsockname()[1]}"
        assert by_descriptor[local.fileno()]["Path"] == str(tmp_path / "local")
        assert by_descriptor[local.fileno()]["Family"] == "AF_UNIX"
        assert by_descriptor[netlink.fileno()]["Family"] == "AF_NETLINK"
        client.sendall(b"they work as before")
    assert shown["Status"]["Pid"] == str(os.getpid())


def test_socket_with_a_name_that_is_no_utf8_is_told_as_text(tmp_path: Path) -> None:
    """Python makes surrogates of it, which no JSON can hold."""
    with socket.socket(socket.AF_UNIX) as local:
        local.bind(os.fsencode(tmp_path) + b"/\xff")

        found = resources.read(os.getpid(), None).sockets

        (path,) = [one["Path"] for one in found if one["Fd"] == local.fileno()]
    assert path == f"{tmp_path}/\\xff"


@pytest.mark.parametrize(("resident", "is_read"), [(256 * 1024, True), (256 * 1024 + 1, False)])
def test_memory_of_a_large_process_is_not_added_up(resident: int, is_read: bool) -> None:
    """The kernel would walk all of it while the process is held."""
    found = Remembered()
    found.learn("7/status", f"Name:\tx\nVmRSS:\t{resident:8} kB\n".encode())
    found.learn("7/smaps_rollup", b"Rss: 1 kB\n")

    assert bool(resources.read(7, None, found).rollup) is is_read


def test_numbers_of_a_cgroup() -> None:
    with memory_cgroup("numbers") as group:
        limit(group, 32 * 1024**2)
        path = cgroup_path(group)

        shown = resources.describe(resources.read(os.getpid(), path))

    numbers = shown["CgroupNumbers"]
    assert str(32 * 1024**2) in (numbers.get("memory.max"), numbers.get("memory.limit_in_bytes"))
    assert resources.read(os.getpid(), "/../../../etc").cgroup == {}


def test_secrets_are_taken_out() -> None:
    found = Resources(
        open_files={3: b"/var/run/login?password=hunter2&x=1"},
        mounts=b"36 35 98:0 / /mnt rw - cifs //h/s rw,username=u,password=hunter2\n",
    )

    assert "hunter2" not in str(resources.describe(found))


def test_sockets_without_a_name_have_no_ends() -> None:
    one, other = socket.socketpair()
    with one, other, socket.socket(socket.AF_UNIX) as lonely:
        shown = resources.describe(resources.read(os.getpid(), None))

        ends = {s["Fd"]: (s["Path"], s["Peer"]) for s in shown["Sockets"] if "Path" in s}
        assert ends[one.fileno()] == (None, None)
        assert ends[lonely.fileno()] == (None, None)


def test_descriptors_of_a_process_that_is_gone_are_left_out() -> None:
    process = subprocess.Popen(["true"])
    process.wait()

    found = resources.read(process.pid, None)

    assert (found.open_files, found.sockets, found.status) == ({}, (), b"")
    assert list(resources.sockets(process.pid, {3: b"socket:[1]"})) == []


def test_not_more_sockets_are_asked_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "MAX_SOCKETS", 2)
    with socket.socket(), socket.socket(), socket.socket():
        found = resources.read(os.getpid(), None)

    assert len(found.sockets) == 2


def test_odd_text_is_read_as_far_as_it_goes() -> None:
    found = Resources(
        status=b"Name:\tx: y\nno field\nVmRSS:\t  12 kB\n",
        open_files={4: b"\xff"},
        oom_score_adj=b"",
    )

    shown = resources.describe(found)

    assert shown["Status"] == {"Name": "x: y", "VmRSS": "12 kB"}
    assert shown["OpenFiles"][0]["Target"] == "\\xff"
    assert shown["OomScoreAdj"] is None
