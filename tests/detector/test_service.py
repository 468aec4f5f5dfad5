"""The detector as a service: the bus away, kills at any moment, settings, health, the end."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from crashbus import Bus, SignalEvent, connect
from crashbus.messages import EventsLost
from tests.support.crashers import crasher
from tests.support.nats import NatsServer, free_port
from tests.support.requirements import need_btf, need_program, need_root
from tests.support.victim import Victim
from tests.support.wait import stop, until


class Service:
    """``python -m services.detector``, started and ended at will."""

    def __init__(self, directory: Path, nats_url: str, **settings: str) -> None:
        self.port = free_port()
        self.environment = {
            **os.environ,
            "CRASHBUS_NATS_URL": nats_url,
            "CRASHBUS_STATE": str(directory / "state"),
            "CRASHBUS_HOST": "test-host",
            "CRASHBUS_DETECTOR_HTTP": f"127.0.0.1:{self.port}",
            **settings,
        }
        self._log = directory / "detector.log"
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start, and wait until it sees signals."""
        before = self.log().count("watching")
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.detector"], env=self.environment, stderr=log
            )

        def watches() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            return self.log().count("watching") > before

        await until(watches, within=60)

    def health(self) -> tuple[int, dict[str, str] | None]:
        """Return the status of /healthz and its faults; None while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz") as answer:
                return answer.status, json.load(answer)["faults"]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["faults"]
        except OSError:
            return 0, None

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            return str(answer.read().decode())

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(12)

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def clean_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def service(tmp_path: Path, nats_server: NatsServer) -> Iterator[Service]:
    need_root()
    need_btf()
    made = Service(tmp_path, nats_server.url)
    yield made
    made.clean_up()


def crash(directory: Path) -> int:
    """Crash a process, and return its PID once it is dead."""
    victim = Victim(crasher("null_pointer"), cwd=directory).go()
    victim.process.communicate()
    return victim.pid


async def events(bus: Bus, pid: int, count: int = 1) -> list[SignalEvent]:
    """Wait for so many events about a process, and return all there are."""

    async def found() -> list[SignalEvent]:
        of_pid = [one for one in await bus.stored(SignalEvent) if one.process.pid == pid]
        return of_pid if len(of_pid) >= count else []

    return await until(found, within=60)


async def test_event_is_on_the_bus(service: Service, bus: Bus, tmp_path: Path) -> None:
    await service.start()
    await until(lambda: service.health() == (200, {}))
    pid = crash(tmp_path)
    (event,) = await events(bus, pid)
    assert event.subject == "crash.signal.test-host.SIGSEGV"
    assert 'crashbus_detector_events_total{disposition="default"} ' in service.metrics()


async def test_events_wait_for_the_bus_over_kills_of_either_side(
    service: Service, nats_server: NatsServer, tmp_path: Path
) -> None:
    nats_server.kill()
    await service.start()
    first = crash(tmp_path)
    # The machine's other crashes are there as well; without a bus none leaves the outbox.
    await until(lambda: f"pid={first} " in service.log())
    await until(lambda: _kept(service) >= service.log().count("signal event"))
    await until(lambda: service.health()[0] == 503)
    service.kill()

    await service.start()
    second = crash(tmp_path)
    nats_server.start()
    async with connect(nats_server.url) as bus:
        await bus.ensure_streams()
        assert len(await events(bus, first)) == 1
        assert len(await events(bus, second)) == 1

    nats_server.kill()
    third = crash(tmp_path)
    nats_server.start()
    async with connect(nats_server.url) as bus:
        for pid in (first, second, third):
            assert len(await events(bus, pid)) == 1
    await until(lambda: service.health() == (200, {}))


def _kept(service: Service) -> float:
    """Return how many messages wait in the outbox."""
    name = "crashbus_detector_outbox_messages "
    lines = service.metrics().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name))


async def test_events_the_kernel_dropped_are_told(
    service: Service, bus: Bus, tmp_path: Path
) -> None:
    service.environment["CRASHBUS_DETECTOR_RING_PAGES"] = "1"
    await service.start()
    assert service.process is not None
    await stop(service.process.pid)
    pids = [crash(tmp_path) for _ in range(30)]
    service.process.send_signal(signal.SIGCONT)

    async def lost() -> int:
        told = await bus.stored(EventsLost)
        assert {one.stage for one in told} <= {"ring_buffer"}
        return sum(one.count for one in told)

    count = await until(lost)
    seen = {one.process.pid for one in await bus.stored(SignalEvent)}
    assert 0 < len(seen & set(pids)) < 30
    # Others may crash on this machine too, but no event is both seen and lost.
    assert len(seen) + count >= 30


async def test_stop_is_in_order_even_without_the_bus(
    service: Service, nats_server: NatsServer, tmp_path: Path
) -> None:
    nats_server.kill()
    await service.start()
    pid = crash(tmp_path)
    since = time.monotonic()
    assert service.end() == 0
    assert time.monotonic() - since < 40
    assert "in_order=True" in service.log()
    assert "Traceback" not in service.log()

    nats_server.start()
    await service.start()
    async with connect(nats_server.url) as bus:
        await bus.ensure_streams()
        assert len(await events(bus, pid)) == 1
    assert service.end() == 0


async def test_stop_publishes_what_was_just_seen(
    service: Service, bus: Bus, tmp_path: Path
) -> None:
    await service.start()
    await until(lambda: service.health() == (200, {}))
    pids = [crash(tmp_path) for _ in range(5)]
    assert service.end() == 0
    seen = {one.process.pid for one in await bus.stored(SignalEvent)}
    assert set(pids) <= seen


def run_to_its_end(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.detector"],
        env={**os.environ, "CRASHBUS_DETECTOR_HTTP": "", **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("SIGNALS", "SIGSEGV,SIGNONE", "there is no signal 'SIGNONE'"),
        ("SIGNALS", "SIGKILL", "SIGKILL"),
        ("SIGNALS", " ", "at least one"),
        ("RING_PAGES", "1000", "power of two"),
        ("OUTBOX_MESSAGES", "many", "integer"),
    ],
)
def test_wrong_setting_is_one_clear_line(variable: str, value: str, says: str) -> None:
    ended = run_to_its_end(**{f"CRASHBUS_DETECTOR_{variable}": value})
    assert ended.returncode == 2
    assert f"CRASHBUS_DETECTOR_{variable}" in ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_privilege_it_says_what_is_needed(tmp_path: Path) -> None:
    need_root()
    ended = subprocess.run(
        [
            *(need_program("setpriv"), "--bounding-set=-all", "--inh-caps=-all"),
            *(sys.executable, "-m", "services.detector"),
        ],
        env={**os.environ, "CRASHBUS_DETECTOR_HTTP": "", "CRASHBUS_STATE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert ended.returncode == 2
    assert "privilege to load eBPF" in ended.stderr
    assert "run as root" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_lists_every_setting() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "services.detector", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    for name in ("SIGNALS", "HANDLED_QUIET", "RING_PAGES", "OUTBOX_MESSAGES", "OUTBOX_BYTES"):
        assert f"CRASHBUS_DETECTOR_{name}" in shown.stdout
