"""An OOM kill of a whole host. Not of this one: test_kernels.py has it in a machine of its own."""

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from crashbus import Bus, Manifest, SignalEvent
from tests.support.core_pattern import core_pattern_kept
from tests.support.crashers import crasher
from tests.support.nats import NatsServer
from tests.support.requirements import IN_MACHINE
from tests.support.service import ServiceProcess
from tests.support.victim import Victim
from tests.support.wait import until

assert IN_MACHINE in os.environ, "this takes all memory of the host: only in a machine of its own"

WITHIN = 300  # seconds; without KVM a machine is slow
SERVICES = ("recorder", "detector", "shipper", "collector")


@pytest_asyncio.fixture
async def delivered(nats_server: NatsServer) -> AsyncIterator[Path]:
    """Where all services, running, deliver to."""
    with core_pattern_kept(), tempfile.TemporaryDirectory(prefix="cb-") as directory:
        place = Path(directory)
        (place / "delivered").mkdir()
        environment = {
            "CRASHBUS_HOST": "test-host",
            "CRASHBUS_NATS_URL": nats_server.url,
            "CRASHBUS_STATE": str(place / "state"),
            "CRASHBUS_SPOOL": str(place / "spool"),
            "CRASHBUS_DESTINATIONS": f"file://{place}/delivered",
            "CRASHBUS_RECORDER_SOCKET": str(place / "run" / "s"),
        }
        services = [ServiceProcess(name, place, environment) for name in SERVICES]
        try:
            for service in services:
                await service.start()
            for service in services:
                await service.healthy(WITHIN)
            yield place / "delivered"
        except TimeoutError as error:
            logs = "\n".join(f"--- {one.name}\n{one.log[-3000:]}" for one in services)
            raise TimeoutError(f"{error}\n{logs}") from None
        finally:
            for service in services:
                await service.stop()


async def bundle(bus: Bus, delivered: Path, pid: int) -> tuple[Manifest, dict[str, Path]]:
    """Return the manifest of a process's crash, and its files by kind where they were delivered."""

    async def look() -> tuple[Manifest, dict[str, Path]] | None:
        for manifest in await bus.stored(Manifest):
            for told in delivered.glob(f"*/*/*{manifest.crash_id}/manifest.json"):
                if manifest.process.pid == pid:
                    files = {
                        file.kind.value: told.with_name(file.stored_name) for file in manifest.files
                    }
                    return manifest, files
        return None

    return await until(look, WITHIN, every=0.2)


def hog(score: int) -> Victim:
    """Return a process that will take memory without end."""
    victim = Victim(crasher("memory_hog"))
    Path(f"/proc/{victim.pid}/oom_score_adj").write_text(str(score))
    return victim


async def test_whom_the_kernel_chose_of_all_processes_is_told_with_why(
    bus: Bus, delivered: Path
) -> None:
    chosen = hog(score=300)

    status = await asyncio.to_thread(chosen.go().process.wait, WITHIN)

    assert status == -signal.SIGKILL
    manifest, files = await bundle(bus, delivered, chosen.pid)
    assert "killed by the OOM killer" in manifest.notes[0]
    assert "constraint=CONSTRAINT_NONE" in manifest.notes[0]
    assert "global_oom" in manifest.notes[0]
    assert set(files) == {"info", "snapshot"}
    oom = json.loads(files["snapshot"].read_bytes())["Oom"]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024  # KiB
    assert memory / 4 < oom["Chosen"]["anon_rss_kib"] < memory
    assert oom["Chosen"]["oom_score_adj"] == 300
    assert "invoked oom-killer" in oom["KernelLog"][0]
    assert any("Mem-Info:" in line for line in oom["KernelLog"])
    assert f"Out of memory: Killed process {chosen.pid} (memory_hog)" in oom["KernelLog"][-1]
    (event,) = [one for one in await bus.stored(SignalEvent) if one.process.pid == chosen.pid]
    assert (event.disposition, event.signal_name) == ("oom_kill", "SIGKILL")
    assert event.crash_id == manifest.crash_id

    # Whoever was spared goes on.
    crashed = Victim(crasher("null_pointer"))
    await asyncio.to_thread(crashed.go().process.wait, WITHIN)
    manifest, files = await bundle(bus, delivered, crashed.pid)
    assert manifest.signal_name == "SIGSEGV"
    assert set(files) >= {"info", "cfg", "backtrace", "snapshot", "core"}
    assert "crash_here" in files["backtrace"].read_text()
