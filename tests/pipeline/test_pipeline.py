"""A process crashes; its files lie, verified, in S3, over TCP and in a directory."""

import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml
import zstandard

from crashbus import DeadLetter, identity, layout
from crashbus.layout import BINARIES, LARGE, SHARED, Kind
from crashbus.messages import Manifest
from services.common import capture
from services.common.capture import UnreadableRecord
from tests.pipeline.conftest import HOST, Pipeline, top_frames
from tests.support.cgroup import limit, memory_cgroup
from tests.support.crashers import FATAL, SOURCES, crasher
from tests.support.nats import free_port
from tests.support.prometheus import DEPLOY, prometheus
from tests.support.requirements import need_program
from tests.support.tcp import reassemble
from tests.support.victim import Victim, waiting
from tests.support.wait import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SAMPLES = Path(__file__).parent.parent / "support" / "samples"


def content(stored: bytes, encoding: str) -> bytes:
    if encoding == "identity":
        return stored
    reader = zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True)
    return bytes(reader.read())


async def run_to_its_end(*command: str | Path) -> int:
    process = await asyncio.create_subprocess_exec(*map(str, command), stderr=subprocess.DEVNULL)
    await asyncio.wait_for(process.wait(), 60)
    return process.pid


def check_everywhere_equal(pipeline: Pipeline, manifest: Manifest) -> None:
    """At each destination lie the bytes of the source, by their SHA-256."""
    for file in manifest.files:
        directory = BINARIES if file.kind in SHARED else str(manifest.process.pid)
        source = (pipeline.spool / directory / file.name).read_bytes()
        assert hashlib.sha256(source).hexdigest() == file.sha256
        for place, stored in pipeline.stored(manifest, file).items():
            assert content(stored, file.encoding) == source, (place, file.name)


def check_received_lines(pipeline: Pipeline, manifest: Manifest) -> None:
    """Over TCP came one line for each small file, in name order, on one connection; the core
    came only where it is asked for, in frames that make it up again."""
    names = sorted(f.name for f in manifest.files if f.kind not in LARGE)
    for receiver in (pipeline.receiver, pipeline.core_receiver):
        mine = [data for data in receiver.received if is_of(data, names, manifest)]
        assert len(mine) == 1
        assert [next(iter(json.loads(line))) for line in mine[0].splitlines()] == names
    (core,) = [file for file in manifest.files if file.kind is Kind.CORE]
    mine = [
        data
        for data in pipeline.core_receiver.received
        if data.startswith(f'{{"{core.name}"'.encode()) and manifest.crash_id.encode() in data
    ]
    source = (pipeline.spool / str(manifest.process.pid) / core.name).read_bytes()
    assert reassemble(mine[0].splitlines(), core.name) == source


def is_of(data: bytes, names: list[str], manifest: Manifest) -> bool:
    keys = {key for line in data.splitlines() for key in json.loads(line)}
    return bool(keys & set(names)) and f'PID: {manifest.process.pid}"'.encode() in data


def check_gdb_opens_it(
    pipeline: Pipeline, manifest: Manifest, program: Path | str, frame: str, directory: Path
) -> None:
    """The core as it is delivered opens in gdb, with this frame among the top ones."""
    (core,) = [file for file in manifest.files if file.kind is Kind.CORE]
    opened = directory / "opened-core"
    opened.write_bytes(content(pipeline.stored(manifest, core)["s3"], core.encoding))
    assert frame in top_frames(program, opened)


@pytest.mark.parametrize(("name", "signal_name"), FATAL.items())
async def test_every_kind_of_crash_is_delivered_everywhere(
    pipeline: Pipeline, name: str, signal_name: str, tmp_path: Path
) -> None:
    program = crasher(name)
    pid = await run_to_its_end(program)
    manifest = await pipeline.manifest_of(pid)
    await pipeline.delivered(manifest)

    assert {file.kind for file in manifest.files} - SHARED == set(layout.SHIPPING_ORDER) - SHARED
    assert manifest.fingerprint is not None
    assert manifest.signal_name == signal_name
    assert not any(file.truncated for file in manifest.files)
    check_everywhere_equal(pipeline, manifest)
    check_received_lines(pipeline, manifest)

    event = (await pipeline.events_of(pid))[-1]
    assert event.crash_id == manifest.crash_id
    assert (event.signal_name, event.disposition) == (signal_name, "default")

    check_gdb_opens_it(pipeline, manifest, program, "crash_here", tmp_path)
    backtrace = next(file for file in manifest.files if file.kind is Kind.BACKTRACE)
    assert b"crash_here" in pipeline.stored(manifest, backtrace)["file"]


async def test_manifest_at_the_destination_names_every_file_there(pipeline: Pipeline) -> None:
    pid = await run_to_its_end(crasher("null_pointer"))
    manifest = await pipeline.manifest_of(pid)
    await pipeline.delivered(manifest)
    folder = pipeline.directory / manifest.folder
    written = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    assert written == manifest
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        *(file.stored_name for file in manifest.files if file.kind not in SHARED),
    }


async def test_binaries_lie_at_each_destination_once_for_each_build(pipeline: Pipeline) -> None:
    program = Path(shutil.copy(crasher("abort"), pipeline.spool.parent / "once"))
    first, second = [await run_to_its_end(program) for _ in range(2)]

    manifests = [await pipeline.manifest_of(pid) for pid in (first, second)]
    for manifest in manifests:
        await pipeline.delivered(manifest)

    modules = [{module.path: module for module in manifest.modules} for manifest in manifests]
    assert modules[0] == modules[1]
    (kept,) = modules[0][str(program)].files()
    assert any("libc.so" in path for path in modules[0])
    came = [file for manifest in manifests for file in manifest.files if file.kind in SHARED]
    assert len({file.name for file in came}) == len(came), "shipped twice"
    build_id = modules[0][str(program)].build_id
    place = f"build-id/{build_id[:2]}/{build_id[2:]}/executable"
    assert (pipeline.directory / place).read_bytes() == program.read_bytes()
    assert pipeline.s3.read(pipeline.bucket, f"crashes/{place}") == program.read_bytes()
    assert hashlib.sha256(program.read_bytes()).hexdigest() == kept.sha256


@pytest.mark.parametrize(("scheme", "build_id"), [("s3", "sha1"), ("file", "none")])
async def test_core_opens_where_none_of_its_binaries_are(
    pipeline: Pipeline, tmp_path: Path, scheme: str, build_id: str
) -> None:
    need_program("gdb")
    library, program = tmp_path / f"libown-{scheme}.so.1.2+3", tmp_path / f"victim-{scheme}"
    _gcc(
        f"__attribute__((noinline)) int deep_{scheme}(int *p) {{ return *p; }}",
        *("-shared", "-fPIC", f"-Wl,-soname,libown-{scheme}.so.1", "-o", library),
    )
    alias = tmp_path / f"libown-{scheme}.so.1"
    alias.symlink_to(library.name)
    _gcc(
        f"int deep_{scheme}(int *); int caller(void) {{ return deep_{scheme}(0); }}"
        "int main(void) { return caller(); }",
        *("-o", program, alias, f"-Wl,-rpath,{tmp_path}", f"-Wl,--build-id={build_id}"),
    )
    pid = await run_to_its_end(program)
    manifest = await pipeline.manifest_of(pid)
    await pipeline.delivered(manifest)
    for path in (library, program, alias):
        path.unlink()

    url = next(url for url in pipeline.destinations if url.startswith(scheme))
    debug = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "crashbus", "debug", manifest.crash_id, "--from", url),
        *("--", "-batch", "-nx", "-ex", "bt", "-ex", "info sharedlibrary"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ
        | {"CRASHBUS_NATS_URL": "nats://127.0.0.1:1", "DEBUGINFOD_URLS": ""}
        | pipeline.s3.settings(),
    )
    out, err = (text.decode() for text in await asyncio.wait_for(debug.communicate(), 60))

    assert debug.returncode == 0, err
    assert re.search(rf"#0 .*deep_{scheme} \(p=0x0\) at ", out), out + err
    assert re.search(r"#1 .*caller \(\) at ", out)
    assert re.search(r"#2 .*main \(\) at ", out)
    assert re.search(rf"Yes.* .*libown-{scheme}", out)
    assert "is missing" not in err


def _gcc(source: str, *options: str | Path) -> None:
    need_program("gcc")
    subprocess.run(
        ["gcc", "-g", "-O0", "-x", "c", "-", "-x", "none", *options],
        input=source.encode(),
        check=True,
    )


async def test_process_that_the_oom_killer_chose_leaves_what_can_be_known(
    pipeline: Pipeline,
) -> None:
    with memory_cgroup("pipeline") as group:
        limit(group, 64 * 1024**2)
        victim = Victim(crasher("memory_hog"))
        (group / "cgroup.procs").write_text(str(victim.pid))
        await asyncio.to_thread(victim.go().process.communicate, timeout=30)
        manifest = await pipeline.manifest_of(victim.pid, files=2)
        await pipeline.delivered(manifest)

    assert victim.process.returncode == -signal.SIGKILL
    assert "killed by the OOM killer" in manifest.notes[0]
    assert "constraint=CONSTRAINT_MEMCG" in manifest.notes[0]
    check_everywhere_equal(pipeline, manifest)
    (file,) = [file for file in manifest.files if file.kind is Kind.SNAPSHOT]
    snapshot = json.loads(pipeline.stored(manifest, file)["s3"])
    assert snapshot["Oom"]["Chosen"]["anon_rss_kib"] > 32 * 1024
    assert f"illed process {victim.pid} " in snapshot["Oom"]["KernelLog"][-1]
    assert str(64 * 1024**2) in snapshot["CgroupNumbers"].values()
    letters = await pipeline.bus.stored(DeadLetter)
    assert not [letter for letter in letters if letter.crash_id == manifest.crash_id]


async def test_python_that_reads_address_zero_is_delivered(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    code = "import ctypes; ctypes.string_at(0)"
    pid = await run_to_its_end(sys.executable, "-c", code)
    manifest = await pipeline.manifest_of(pid)
    await pipeline.delivered(manifest)
    assert manifest.signal_name == "SIGSEGV"
    assert manifest.process.command_line[-1] == code
    check_everywhere_equal(pipeline, manifest)
    check_received_lines(pipeline, manifest)
    python = Path(sys.executable).resolve()
    check_gdb_opens_it(pipeline, manifest, python, "string_at", tmp_path)


async def test_nginx_master_hit_by_sigbus_is_delivered(pipeline: Pipeline, tmp_path: Path) -> None:
    nginx = need_program("nginx") if shutil.which("nginx") else need_program("/usr/sbin/nginx")
    tmp_path.chmod(0o755)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log off; server {{ listen 127.0.0.1:{free_port()}; }} }}\n"
    )
    master = subprocess.Popen([nginx, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "error.log"])
    children = Path(f"/proc/{master.pid}/task/{master.pid}/children")
    workers = await until(lambda: children.read_text().split())
    try:
        os.kill(master.pid, signal.SIGBUS)
        await asyncio.to_thread(master.wait, 30)
        manifest = await pipeline.manifest_of(master.pid)
        await pipeline.delivered(manifest)
    finally:
        for worker in workers:
            os.kill(int(worker), signal.SIGTERM)
    (event,) = await pipeline.events_of(master.pid)
    assert event.sender is not None and event.sender.pid == os.getpid()
    check_everywhere_equal(pipeline, manifest)
    check_received_lines(pipeline, manifest)
    check_gdb_opens_it(pipeline, manifest, nginx, "ngx_master_process_cycle", tmp_path)
    backtrace = next(file for file in manifest.files if file.kind is Kind.BACKTRACE)
    assert b"ngx_master_process_cycle" in pipeline.stored(manifest, backtrace)["s3"]


@pytest.mark.parametrize("case", sorted(path.name for path in SAMPLES.iterdir()))
async def test_files_that_appscope_wrote_arrive_unchanged(pipeline: Pipeline, case: str) -> None:
    pid = 4_100_000 + sorted(p.name for p in SAMPLES.iterdir()).index(case)
    epoch = next((SAMPLES / case).iterdir()).name.rpartition("_")[2]
    # The set appears at once, as if the collector had been away when it was written.
    hidden = pipeline.spool / f".{pid}"
    shutil.copytree(SAMPLES / case, hidden)
    (hidden / f"core_{epoch}").write_bytes(os.urandom(3_000_000))
    hidden.rename(pipeline.spool / str(pid))
    manifest = await pipeline.manifest_of(pid, files=4)
    await pipeline.delivered(manifest)
    assert not any(file.truncated for file in manifest.files)
    check_everywhere_equal(pipeline, manifest)
    received = next(data for data in pipeline.receiver.received if f"info_{epoch}".encode() in data)
    assert received == appscope_lines(case, epoch)


def appscope_lines(case: str, epoch: str) -> bytes:
    """Return what AppScope's daemon sends of a sample: json.Marshal of Go, which sorts keys and
    leaves out blanks; files that are no JSON go as their lines."""

    def text(kind: str) -> str:
        return (SAMPLES / case / f"{kind}_{epoch}").read_text()

    values = (
        {f"backtrace_{epoch}": text("backtrace").split("\n")},
        {f"cfg_{epoch}": json.loads(text("cfg"))},
        {f"info_{epoch}": text("info").split("\n")},
    )
    compact = [json.dumps(value, sort_keys=True, separators=(",", ":")) for value in values]
    return "".join(f"{line}\n" for line in compact).encode()


def start_container(root: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a process like one under AppScope, with a root and a PID namespace of its own."""
    (root / "tmp" / "appscope").mkdir(parents=True)
    # The detector knows AppScope's handlers by the name of the file they lie in.
    program = root / "libscope.so"
    source = SOURCES / "appscope_like.c"
    subprocess.run(["gcc", "-static", "-O1", "-o", program, source], check=True)
    inside = ["chroot", str(root), "/libscope.so", "/tmp/appscope", *options]
    return subprocess.Popen(["unshare", "--pid", "--fork", "--mount", "--kill-child", *inside])


async def test_appscope_files_in_a_container_are_brought_out_and_delivered(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """Its root is gone with its end."""
    container = start_container(tmp_path / "root")
    await asyncio.to_thread(container.wait, 30)
    shutil.rmtree(tmp_path / "root")

    async def brought_out() -> Manifest | None:
        for manifest in reversed(await pipeline.bus.stored(Manifest)):
            kinds = [file.kind for file in manifest.files]
            if manifest.process.comm == "libscope.so" and kinds.count(Kind.CORE) == 2:
                return manifest
        return None

    # The library's own set, and the recorder's of the abort() that follows: one crash.
    manifest = await until(brought_out, within=60, every=0.1)
    await pipeline.delivered(manifest)
    assert manifest.process.ns_pid == 1
    assert manifest.signal_name == "SIGSEGV", "not the SIGABRT that the library ends in"
    assert manifest.modules and manifest.fingerprint
    assert any("AppScope's library" in note for note in manifest.notes)
    check_everywhere_equal(pipeline, manifest)
    events = await pipeline.events_of(manifest.process.pid)
    handled = next(event for event in events if event.disposition == "handled")
    assert handled.handler is not None and handled.handler.appscope
    assert {event.crash_id for event in events} == {manifest.crash_id}


async def test_container_process_that_recovers_has_every_set_brought_out(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """The detector publishes the first signal only; the others' sets come out as well."""
    container = start_container(tmp_path / "root", "recover")

    async def all_sets() -> Manifest | None:
        for manifest in reversed(await pipeline.bus.stored(Manifest)):
            kinds = [file.kind for file in manifest.files]
            if manifest.process.ns_pid == 1 and kinds.count(Kind.CORE) == 3:
                return manifest
        return None

    try:
        manifest = await until(all_sets, within=60, every=0.1)
        await pipeline.delivered(manifest)
        check_everywhere_equal(pipeline, manifest)
        assert len({file.name for file in manifest.files}) == 12
    finally:
        container.kill()
        container.wait()


async def test_storm_of_crashes_loses_none(pipeline: Pipeline) -> None:
    program = crasher("division_by_zero")
    pids = await asyncio.gather(*(run_to_its_end(program) for _ in range(30)))
    assert len(set(pids)) == 30
    manifests = [await pipeline.manifest_of(pid, within=90) for pid in pids]
    for manifest in manifests:
        await pipeline.delivered(manifest, within=90)
        check_everywhere_equal(pipeline, manifest)


async def test_prometheus_sees_all_that_rules_and_dashboard_ask_for(pipeline: Pipeline) -> None:
    pid = await run_to_its_end(crasher("null_pointer"))
    await pipeline.delivered(await pipeline.manifest_of(pid))
    addresses = {name: service.http for name, service in pipeline.services.items()}
    with prometheus(pipeline.directory.parent / "prometheus", addresses) as seen:
        await until(lambda: seen.up() == set(addresses), every=0.5)

        known = set(seen.ask("label/__name__/values"))
        # Those that have no value yet, such as failures by their reason.
        known |= {f"{family}_total" for family in seen.ask("metadata")}
        for expression in queries():
            metrics = set(re.findall(r"crashbus_\w+", expression))
            assert metrics, expression
            assert metrics <= known, expression
            seen.ask("query", query=expression)  # refused if it is no query
        (group,) = seen.ask("rules")["groups"]
        evaluated = {"ok", "unknown"}  # unknown: not yet
        assert {rule["health"] for rule in group["rules"]} <= evaluated, group

        for query in (
            'sum(crashbus_detector_events_total{disposition="default"})',
            'sum(crashbus_recorder_captures_total{result="complete"})',
            "sum(crashbus_recorder_hold_seconds_count)",
            "sum(crashbus_recorder_core_bytes_total)",
            "sum(crashbus_collector_sent_bytes_total)",
            "sum(crashbus_shipper_bytes_in_total)",
            "sum(crashbus_shipper_bytes_out_total)",
            'sum(crashbus_collector_delivery_seconds_count{part="small"})',
            'sum(crashbus_collector_delivery_seconds_count{part="whole"})',
            "count(crashbus_shipper_queue_items)",
        ):
            await until(partial(seen.value, query), every=0.5)
        await until(lambda: seen.value("sum(crashbus_healthy)") == len(addresses), every=0.5)


def queries() -> list[str]:
    """Return what the alert rules and the dashboard ask of Prometheus."""
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    asked = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "crashbus.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "1m")
            asked.append(expression.replace("$__range", "1h"))
    return [one for one in asked if "crashbus_" in one]


async def test_crash_in_the_hands_of_a_killed_recorder_is_delivered_whole(
    pipeline: Pipeline,
) -> None:
    """Its backtrace waits for its turn behind others when the recorder is killed."""
    recorder = pipeline.services["recorder"]
    victims = waiting(12)
    for victim in victims:
        victim.send_signal(signal.SIGSEGV)
    await until(lambda: pids_with_core_in_hand(pipeline.spool))

    recorder.kill(signal.SIGSTOP)
    in_hand = pids_with_core_in_hand(pipeline.spool)
    recorder.kill(signal.SIGKILL)
    for victim in victims:
        await asyncio.to_thread(victim.communicate)
    await recorder.wait(60)
    await recorder.start()

    assert in_hand
    for pid in in_hand:
        manifest = await pipeline.manifest_of(pid)
        own = [file for file in manifest.files if file.kind not in SHARED]
        assert len(own) == 6 and not any(file.truncated for file in own), manifest
        assert not any("cut short" in note for note in manifest.notes)
        await pipeline.delivered(manifest)


async def test_snapshot_of_a_process_and_its_later_crash_are_two_things(
    pipeline: Pipeline,
) -> None:
    (victim,) = waiting(1)
    taking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "crashbus", "snapshot", str(victim.pid)),
        env=os.environ
        | {"CRASHBUS_SPOOL": str(pipeline.spool), "CRASHBUS_HOST": HOST}
        | {"CRASHBUS_STATE": str(pipeline.spool.parent / "state")},
    )
    assert await asyncio.wait_for(taking.wait(), 60) == 0
    living = await pipeline.manifest_of(victim.pid)
    await pipeline.delivered(living)

    victim.send_signal(signal.SIGSEGV)
    victim.communicate()

    crash = await pipeline.manifest_of_crash(crash_id_of(living))
    await pipeline.delivered(crash)
    assert (living.signal_name, crash.signal_name) == ("none", "SIGSEGV")
    assert living.crash_id != crash.crash_id and living.folder != crash.folder
    for manifest in (living, crash):
        check_everywhere_equal(pipeline, manifest)


def crash_id_of(manifest: Manifest) -> str:
    process = manifest.process
    return identity.crash_id(process.boot_id, process.pid, process.start_ticks)


def pids_with_core_in_hand(spool: Path) -> list[int]:
    """Return whose core is said to be whole while the rest is still to be made."""
    found = []
    for draft in (spool / layout.DRAFTS).glob("*"):
        pid, _, epoch = draft.name.partition("-")
        with suppress(OSError, UnreadableRecord), (spool / pid / f"capture_{epoch}").open() as file:
            record = capture.read(file.fileno())
            if f"core_{epoch}" in record.files and record.state == "writing":
                found.append(int(pid))
    return found
