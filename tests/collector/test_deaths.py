"""Deaths that the detector saw: those without crash files are told."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from nats.js.errors import NotFoundError

from crashbus import DeadLetter, SignalEvent, layout, streams
from services.common.unrecorded import Unrecorded
from tests.collector.conftest import Setup, reports
from tests.collector.stand_in import signal_event
from tests.detector.watching import Watch
from tests.support.crashers import crasher
from tests.support.notes import packed
from tests.support.requirements import need_btf
from tests.support.victim import Victim
from tests.support.wait import until

pytestmark = pytest.mark.usefixtures("shipper")


async def deaths_in_hand(setup: Setup, count: int) -> bool:
    """Tell whether the collector follows just so many signal events."""
    with suppress(NotFoundError):  # its consumer is made soon
        info = await setup.bus._js.consumer_info(streams.SIGNALS, "collector-signals-test-host")
        return bool(info.num_ack_pending == count)
    return False


async def started(setup: Setup) -> None:
    """Start the collector, and wait until it hears of every death from now on."""
    await setup.collector.start()
    await until(lambda: deaths_in_hand(setup, 0))


async def is_all_heard(setup: Setup) -> bool:
    """Tell whether every signal event was taken, and is settled."""
    info = await setup.bus._js.consumer_info(streams.SIGNALS, "collector-signals-test-host")
    left = info.num_pending + info.num_ack_pending
    return bool(left == 0 and info.delivered.stream_seq > 0)


async def die(setup: Setup, told: dict["subprocess.Popen[bytes]", SignalEvent]) -> None:
    """Have processes die, of which the detector tells, until nothing is left to find out."""
    for process, event in told.items():
        process.kill()
        process.wait()
        await setup.bus.publish(event)
    await until(lambda: setup.bus.stored(DeadLetter), 30)
    await until(lambda: deaths_in_hand(setup, 0), 30)


async def test_death_without_crash_files_is_told(setup: Setup) -> None:
    await started(setup)
    victim = subprocess.Popen(["sleep", "60"])
    event = signal_event(victim.pid)
    await setup.bus.publish(event)
    # It is alive, so nothing is told yet; its end is what decides.
    await until(lambda: deaths_in_hand(setup, 1))
    assert await setup.bus.stored(DeadLetter) == []
    victim.kill()
    victim.wait()
    (manifest,) = await reports(setup)
    (letter,) = await setup.bus.stored(DeadLetter)
    assert letter.reason == "not_captured" and letter.crash_id == event.crash_id
    refuses = Path("/proc/sys/fs/suid_dumpable").read_text().strip() == "0"
    assert ("sysctl fs.suid_dumpable=2, if it runs as another user" in letter.mend) is refuses
    assert manifest.files == () and "nothing captured it" in manifest.notes[0]


async def test_crash_that_was_read_and_has_no_record_yet_is_waited_for(setup: Setup) -> None:
    await started(setup)
    read, lost = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])
    unrecorded = Unrecorded(setup.spool)
    assert unrecorded.begin(read.pid, packed({}))
    events = [signal_event(process.pid) for process in (read, lost)]
    for event in events:
        await setup.bus.publish(event)
    await until(lambda: deaths_in_hand(setup, 2))
    for process in (read, lost):
        process.kill()
        process.wait()
    # The one that died later is told, so this one would have been.
    await until(lambda: deaths_in_hand(setup, 1))
    letters = await setup.bus.stored(DeadLetter)
    assert [one.crash_id for one in letters] == [events[1].crash_id]

    unrecorded.end(read.pid)

    await reports(setup, 2)
    letters = await setup.bus.stored(DeadLetter)
    assert [one.crash_id for one in letters] == [events[1].crash_id, events[0].crash_id]
    assert {one.reason for one in letters} == {"not_captured"}


async def test_crash_that_a_killed_recorder_left_a_note_of_is_not_told_as_missing(
    setup: Setup,
) -> None:
    await started(setup)
    noted, lost = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])
    told = {process: signal_event(process.pid) for process in (noted, lost)}
    unrecorded = Unrecorded(setup.spool)
    crash = b"%d %d 11 %d\n" % (noted.pid, noted.pid, told[noted].time)
    assert unrecorded.begin(noted.pid, packed({"crash": crash}))
    os.close(unrecorded._file)  # as when it is killed

    await die(setup, told)

    assert [one.crash_id for one in await setup.bus.stored(DeadLetter)] == [told[lost].crash_id]


async def test_crash_that_the_pipe_helper_keeps_is_not_told_as_missing(setup: Setup) -> None:
    await started(setup)
    kept, lost = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])
    told = {process: signal_event(process.pid) for process in (kept, lost)}
    place = setup.spool / layout.ORPHANS / f"{int(told[kept].time)}-{kept.pid}"
    place.mkdir(parents=True)

    await die(setup, told)

    assert [one.crash_id for one in await setup.bus.stored(DeadLetter)] == [told[lost].crash_id]


@pytest.mark.parametrize("writes", [False, True])
async def test_process_that_hangs_in_appscopes_handler_is_told(
    setup: Setup, tmp_path: Path, writes: bool
) -> None:
    """As where its library cannot write; it was told of a while ago."""
    need_btf()
    await started(setup)
    watch, program = Watch(tmp_path / "watch"), crasher("handled_by_libscope")
    own = f"mkdir -p /tmp/appscope && mount -t tmpfs none /tmp/appscope && exec {program} on"
    victim = Victim("/usr/bin/unshare", "--mount", "sh", "-c", own, cwd=tmp_path).go()
    place = Path(f"/proc/{victim.pid}/root/tmp/appscope/{victim.pid}")
    try:
        event = await watch.event(victim.pid)
        assert event.handler is not None and event.handler.appscope
        event = event.model_copy(update={"time": event.time - 11})
        if writes:
            place.mkdir()
            (place / f"info_{int(event.time)}").write_text("Process name: x")

        await setup.bus.publish(event)

        if not writes:
            (letter,) = await until(lambda: setup.bus.stored(DeadLetter), 30)
            assert (letter.reason, letter.crash_id) == ("appscope_stuck", event.crash_id)
            assert f"crashbus snapshot --core {victim.pid}" in letter.mend
        await until(lambda: is_all_heard(setup), 30)
        assert len(await setup.bus.stored(DeadLetter)) == (not writes)
    finally:
        victim.end()
        watch.close()


@pytest.mark.parametrize("odd", ["forged_crash_id", "long_lived"])
async def test_odd_events_do_not_end_the_following_of_deaths(setup: Setup, odd: str) -> None:
    await started(setup)
    for number in range(600):
        event = signal_event(os.getpid()).model_copy(update={"event_id": f"{odd}-{number}"})
        if odd == "forged_crash_id":
            event = event.model_copy(update={"crash_id": "0" * 16})
        await setup.bus.publish(event)
    victim = subprocess.Popen(["sleep", "60"])
    event = signal_event(victim.pid)
    await setup.bus.publish(event)
    victim.kill()
    victim.wait()

    async def told() -> bool:
        letters = await setup.bus.stored(DeadLetter)
        return [letter.crash_id for letter in letters] == [event.crash_id]

    await until(told, within=60)
    refused = setup.collector.metric("crashbus_collector_refused_total")
    assert refused == (600 if odd == "forged_crash_id" else 0)
