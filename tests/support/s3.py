"""A real S3 server: Ceph's object gateway with one monitor and one storage daemon, on loopback.

It checks signatures and digests as a cluster of many hosts would, and can be stopped, killed and
restarted in parts. Needs root and Debian's ceph-mon, ceph-osd and radosgw.
"""

import json
import random
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from minio import Minio

from tests.support.nats import free_port
from tests.support.requirements import need_program, need_root

STORE_SIZE = 8 * 1024**3  # bytes, a sparse file

# The small figures make a cluster of one answer at once instead of after its usual pauses. A
# gateway that takes the place of a killed one waits for the watches of the dead to run out.
_CONFIG = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon2},v1:127.0.0.1:{mon1}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
keyring = /dev/null
ms_mon_client_mode = crc
ms_bind_port_min = {first}
ms_bind_port_max = {last}
run_dir = {directory}
crash_dir = {directory}
log_file = {directory}/$name.log
admin_socket =

[mon]
mon_data = {directory}/mon
mon_data_avail_warn = 2
mon_data_avail_crit = 1
mon_allow_pool_size_one = true
paxos_propose_interval = 0.02
paxos_min_wait = 0.01
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0

[osd]
osd_data = {directory}/osd
osd_objectstore = bluestore
osd_memory_target = 939524096
bluestore_block_size = {size}
osd_client_watch_timeout = 2
osd_default_notify_timeout = 2

[client.rgw]
rgw_frontends = beast endpoint={address}:{port}
rgw_rados_pool_pg_num_min = 4
rgw_enable_usage_log = false
rgw_dynamic_resharding = false
rgw_override_bucket_index_max_shards = 1
"""


class S3Server:
    """One server of its own directory.

    Args:
        address: where the gateway listens.
        there: a command that runs a command where the server is to be.

    Attributes:
        endpoint: the same after a restart of the gateway.
    """

    access_key = "crashbus-test"
    secret_key = "crashbus-test-secret"

    def __init__(
        self, directory: Path, address: str = "127.0.0.1", there: Sequence[str] = ()
    ) -> None:
        self._directory = directory
        self._address = address
        self._there = there
        self._config = directory / "ceph.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.port = free_port()
        self.endpoint = f"http://{address}:{self.port}"

    def start(self) -> None:
        """Make the cluster and start it; the gateway answers when this returns."""
        self._write_config()
        self._make_monitor()
        self._spawn("mon", "ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        self._call("ceph", "--connect-timeout", "30", "osd", "new", osd)
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._spawn("osd", "ceph-osd", "-i", "0")
        keys = ("--access-key", self.access_key, "--secret-key", self.secret_key)
        self.admin("user", "create", "--uid=test", "--display-name=test", "--max-buckets=0", *keys)
        self.start_gateway()

    def _write_config(self) -> None:
        for name in ("mon", "osd"):
            (self._directory / name).mkdir()
        first = random.randrange(20000, 31000)  # below what the kernel gives to clients
        self._fsid = str(uuid.uuid4())
        self._mon2, self._mon1 = free_port(), free_port()
        self._config.write_text(
            _CONFIG.format(
                fsid=self._fsid,
                directory=self._directory,
                mon1=self._mon1,
                mon2=self._mon2,
                first=first,
                last=first + 60,
                address=self._address,
                port=self.port,
                size=STORE_SIZE,
            )
        )

    def _make_monitor(self) -> None:
        monmap = str(self._directory / "monmap")
        place = f"[v2:127.0.0.1:{self._mon2},v1:127.0.0.1:{self._mon1}]"
        made = ["monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", place, monmap]
        subprocess.run(made, check=True, capture_output=True)
        self._call("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)

    def admin(self, *arguments: str) -> str:
        """Run radosgw-admin and return what it prints."""
        return self._call("radosgw-admin", *arguments)

    def _call(self, program: str, *arguments: str) -> str:
        command = [*self._there, program, "-c", str(self._config), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        return done.stdout

    def _spawn(self, name: str, *command: str) -> None:
        with (self._directory / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [*self._there, *command, "-f", "-c", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # so that Ctrl-C reaches pytest first
            )

    def start_gateway(self, *options: str) -> None:
        """Start the gateway, with more of its options, and wait until it listens."""
        self._spawn("rgw", "radosgw", "-n", "client.rgw", *options)
        end = time.monotonic() + 60
        while time.monotonic() < end and self._daemons["rgw"].poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((self._address, self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError((self._directory / "rgw.out").read_text()[-2000:])

    @property
    def pids(self) -> list[int]:
        """The processes that it consists of."""
        return [daemon.pid for daemon in self._daemons.values()]

    def kill_gateway(self) -> None:
        """End the gateway as a power cut would."""
        self._end("rgw", signal.SIGKILL)

    def pause_gateway(self) -> None:
        """Let the gateway hang: it is there and does not answer."""
        self._daemons["rgw"].send_signal(signal.SIGSTOP)

    def resume_gateway(self) -> None:
        self._daemons["rgw"].send_signal(signal.SIGCONT)

    @contextmanager
    def store_paused(self) -> Iterator[None]:
        """Let the daemon hang that keeps the objects; the gateway goes on."""
        self._daemons["osd"].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._daemons["osd"].send_signal(signal.SIGCONT)

    def ensure_gateway(self) -> None:
        """Have the gateway run again, after a test did something to it."""
        gateway = self._daemons.get("rgw")
        if gateway is None or gateway.poll() is not None:
            self.start_gateway()
        else:
            self.resume_gateway()

    def stop(self) -> None:
        """End everything this server started; its data is not wanted any more."""
        for name in ("rgw", "osd", "mon"):
            self._end(name, signal.SIGKILL)

    def _end(self, name: str, number: int) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.send_signal(signal.SIGCONT)
        daemon.send_signal(number)
        try:
            daemon.wait(60)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait(60)

    def add_user(self, name: str) -> tuple[str, str]:
        """Make a further user and return its access and secret key."""
        made = self.admin("user", "create", f"--uid={name}", f"--display-name={name}")
        keys = json.loads(made)["keys"][0]
        return keys["access_key"], keys["secret_key"]

    def suspend(self, user: str) -> None:
        """Let the server refuse a user."""
        self.admin("user", "suspend", f"--uid={user}")

    def client(self) -> Minio:
        """Return a client of the server's first user."""
        address = self.endpoint.removeprefix("http://")
        return Minio(address, self.access_key, self.secret_key, secure=False, region="us-east-1")

    def make_bucket(self, name: str = "") -> str:
        """Make a bucket, by default one that no other test uses, and return its name."""
        name = name or f"test-{uuid.uuid4().hex[:12]}"
        self.client().make_bucket(name)
        return name

    def read(self, bucket: str, key: str) -> bytes:
        """Return an object's content."""
        answer = self.client().get_object(bucket, key)
        try:
            return bytes(answer.read())
        finally:
            answer.close()
            answer.release_conn()

    def keys(self, bucket: str) -> list[str]:
        """Return the names of all objects of a bucket."""
        found = self.client().list_objects(bucket, recursive=True)
        return sorted(str(one.object_name) for one in found)

    def unfinished_uploads(self, bucket: str) -> list[str]:
        """Return the keys of multipart uploads that were neither completed nor aborted."""
        found = self.client()._list_multipart_uploads(bucket)
        return [str(one.object_name) for one in found.uploads]

    def settings(self) -> dict[str, str]:
        """Return the shipper's environment variables for this server."""
        return {
            "CRASHBUS_SHIPPER_S3_ENDPOINT": self.endpoint,
            "CRASHBUS_SHIPPER_S3_ACCESS_KEY": self.access_key,
            "CRASHBUS_SHIPPER_S3_SECRET_KEY": self.secret_key,
        }


@pytest.fixture(scope="session")
def s3_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The session's one S3 server."""
    need_root()
    for program in ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool"):
        need_program(program)
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3(s3_session: S3Server) -> Iterator[S3Server]:
    """The S3 server; its gateway runs, whatever the test before did to it."""
    yield s3_session
    s3_session.ensure_gateway()
