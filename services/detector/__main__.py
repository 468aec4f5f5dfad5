"""``python -m services.detector``: settings, outbox, detector and bus, wired together."""

import asyncio

import structlog

from services.common.outbox import Outbox
from services.common.publisher import Publisher
from services.common.service import Runtime, finish, run
from services.common.settings import SettingsError
from services.detector import metrics, requirements
from services.detector.detector import Detector
from services.detector.settings import DetectorSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

STORE_WITHIN = 4.0  # seconds of the ten that a stop may take
PUBLISH_WITHIN = 3.0
NEARLY_FULL = 0.8


async def work(runtime: Runtime, settings: DetectorSettings) -> None:
    """Detect first, then find the bus: what is seen meanwhile waits in the outbox."""
    runtime.health.failing("bpf", "not loaded yet")
    _refuse_if_unable()
    outbox = await asyncio.to_thread(
        Outbox,
        runtime.bus_settings.state / "detector" / "outbox.sqlite",
        settings.outbox_messages,
        settings.outbox_bytes,
    )
    publisher = Publisher(outbox, runtime)
    detector = Detector(settings, runtime.host, outbox, publisher.wake)
    publishing: asyncio.Task[None] | None = None
    try:
        await asyncio.to_thread(detector.start)
        runtime.health.working("bpf")
        log.info("watching", signals=",".join(settings.signals))
        runtime.ready()
        publishing = asyncio.create_task(_publish(runtime, publisher), name="publish")
        while True:
            await asyncio.wait({publishing}, timeout=1)
            if publishing.done():
                publishing.result()
            await asyncio.to_thread(detector.tick)
            _look_at(runtime, detector, outbox)
    finally:
        await asyncio.to_thread(detector.stop, STORE_WITHIN)
        if publishing is not None:
            if publisher.can_publish:
                await finish(publisher.drained(), PUBLISH_WITHIN)
            publishing.cancel()
            await asyncio.wait({publishing})
        await asyncio.to_thread(outbox.close)


def _refuse_if_unable() -> None:
    missing = [finding for finding in requirements.check() if not finding.ok]
    if missing:
        raise SettingsError("\n".join(f"{one.name}: {one.detail}; {one.mend}" for one in missing))


async def _publish(runtime: Runtime, publisher: Publisher) -> None:
    async with runtime.bus() as bus:
        await publisher.run(bus)


def _look_at(runtime: Runtime, detector: Detector, outbox: Outbox) -> None:
    """Bring health and metrics up to date.

    Raises:
        Exception: what made a thread of the detector end; only a restart mends it.
    """
    if detector.failure is not None:
        runtime.health.failing("bpf", f"stopped: {detector.failure}")
        raise detector.failure
    messages, size = outbox.usage()
    metrics.OUTBOX_MESSAGES.set(messages)
    metrics.OUTBOX_BYTES.set(size)
    metrics.OUTBOX_LOST.set(outbox.lost_total)
    metrics.OUTBOX_CORRUPTED.set(outbox.corrupted_total)
    fault = outbox.fault
    if fault is None and outbox.fullness() > NEARLY_FULL:
        fault = f"{messages} messages wait for the bus, nearly all there is room for"
    if fault is None:
        runtime.health.working("outbox")
    else:
        runtime.health.failing("outbox", fault)


def main() -> None:
    """Run the detector until SIGTERM."""
    run("detector", DetectorSettings, work, http=lambda settings: settings.http)


if __name__ == "__main__":
    main()
