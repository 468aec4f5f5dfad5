"""How a service lives: read settings, connect, work until SIGTERM, leave in order.

A service is an ``async`` function that works until it is cancelled::

    async def work(runtime: Runtime, settings: MySettings) -> None: ...

    def main() -> None:
        run("collector", CollectorSettings, work)
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import structlog
from pydantic_core import PydanticUndefined

from crashbus import own_cores
from crashbus.bus import Bus
from crashbus.connecting import connect, without_secrets
from crashbus.errors import BusFull, BusUnreachable
from services.common import log as logs
from services.common import metrics, redact
from services.common.bus_settings import BusSettings
from services.common.certificate import Connect, follow_certificate
from services.common.health import Health, serve
from services.common.memory import keep_little
from services.common.metrics import BUILD
from services.common.settings import Settings, SettingsError, variable_of

log: structlog.stdlib.BoundLogger = structlog.get_logger()

S = TypeVar("S", bound=Settings)

STOP_WITHIN = 10.0  # seconds from SIGTERM to exit; what docker stop grants by default
LEAVE_WITHIN = 0.5  # seconds of these for Python to end by itself
CONNECT_AGAIN = 1.0  # seconds between tries to reach the bus at the start

EXIT_FAILED = 1
EXIT_SETTINGS = 2  # a restart will not help

VERSION = version("crashbus")


@dataclass(frozen=True)
class Runtime:
    """What every service works with."""

    name: str
    bus_settings: BusSettings
    health: Health

    def ready(self) -> None:
        """Say that the service does its job from now on; until then it is not healthy."""
        self.health.working("start")
        log.info("ready")

    @property
    def host(self) -> str:
        """This host's name on the bus."""
        return self.bus_settings.host

    @asynccontextmanager
    async def bus(self, needed: bool = True, makes_streams: bool = False) -> AsyncIterator[Bus]:
        """Connect to the bus; waits as long as it takes.

        Args:
            needed: the service is not healthy without it.
            makes_streams: this service makes the streams. Others go on without, and try what
                they do until they are there: who may not change the bus needs no right to.
        """
        health = self.health if needed else Health()
        async with AsyncExitStack() as stack:
            bus, again = await self._connected(stack, health, makes_streams)
            metrics.CERTIFICATE_END.set_function(lambda: bus.certificate_end or 0)
            health.watch(
                "bus_connection", lambda: None if bus.is_connected else "lost, reconnecting"
            )
            following = asyncio.create_task(follow_certificate(bus, again), name="certificate")
            try:
                yield bus
            finally:
                following.cancel()
                await asyncio.wait({following})

    async def _connected(
        self, stack: AsyncExitStack, health: Health, makes_streams: bool
    ) -> tuple[Bus, Connect]:
        """Return a connection, and what makes another like it."""
        while True:
            options = self.bus_settings.connection_options(f"crashbus-{self.name}")
            again = partial(connect, self.bus_settings.nats_url, host=self.host, **options)
            try:
                bus = await stack.enter_async_context(again())
                if makes_streams:
                    await bus.ensure_streams(
                        self.bus_settings.chunk_store_bytes, self.bus_settings.nats_replicas
                    )
            except (BusUnreachable, BusFull) as error:
                if "bus" not in health.faults():
                    log.warning("waiting for the bus", error=str(error))
                health.failing("bus", str(error))
                await stack.aclose()
                await asyncio.sleep(CONNECT_AGAIN)
            else:
                health.working("bus")
                log.info("connected to the bus", url=without_secrets(self.bus_settings.nats_url))
                return bus, again


Work = Callable[[Runtime, S], Coroutine[Any, Any, None]]


def run(name: str, settings_class: type[S], work: Work[S], http: Callable[[S], str]) -> None:
    """Run a service to its end and exit; this is its ``main``.

    Args:
        http: tells from the settings where to serve health and metrics.

    Exits with 0 after SIGTERM or SIGINT, 2 when a setting is wrong, 1 when it failed.
    """
    _help(name, settings_class)
    # Before we read a file with a key. A crash until now leaves a core, which has the environment
    # in it: docs/decisions/0024-own-cores.md.
    own_cores.leave_none(f"cb-{name}")
    try:
        bus_settings, settings = BusSettings.load(), settings_class.load()
        redact.also(bus_settings.redact_names, bus_settings.redact_forms)
    except SettingsError as error:
        sys.stderr.write(f"crashbus {name}: {error}\n")
        sys.exit(EXIT_SETTINGS)
    keep_little()
    logs.configure(bus_settings.log_level, bus_settings.log_format, name)
    runtime = Runtime(name, bus_settings, Health())
    runtime.health.failing("start", "not ready yet")
    BUILD.info({"version": VERSION, "host": runtime.host})
    try:
        stop_serving = serve(runtime.health, http(settings))
    except (OSError, ValueError, OverflowError) as error:
        variable = variable_of(settings_class, "http")
        sys.stderr.write(
            f"crashbus {name}: cannot serve health on {http(settings)!r}: {error}; set {variable}\n"
        )
        sys.exit(EXIT_SETTINGS)
    try:
        status = asyncio.run(_until_signal(runtime, work(runtime, settings)))
    finally:
        stop_serving()
    sys.exit(status)


async def _until_signal(runtime: Runtime, work: Coroutine[Any, Any, None]) -> int:
    """Work until a signal says stop or it fails by itself; return the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    working = asyncio.create_task(work, name=runtime.name)
    stopping = asyncio.create_task(stop.wait(), name="stop")
    beating = asyncio.create_task(_beat(runtime.health), name="beat")
    log.info("started", version=VERSION, host=runtime.host)
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for task in (working, stopping, beating):
        task.cancel()
    await asyncio.wait({working}, timeout=STOP_WITHIN - 1)
    status = _say_end(runtime.name, working)
    _leave_in_time(status)
    return status


def _say_end(name: str, working: asyncio.Task[None]) -> int:
    """Say how the work ended; return the exit status."""
    failure = working.exception() if working.done() and not working.cancelled() else None
    if failure is None:
        log.info("stopped", in_order=working.done())
        return 0
    if isinstance(failure, SettingsError):
        sys.stderr.write(f"crashbus {name}: {failure}\n")
        return EXIT_SETTINGS
    log.error("failed", exc_info=failure)
    return EXIT_FAILED


def _leave_in_time(status: int) -> None:
    """End the process soon even if a thread is stuck in a system call.

    All is said and handed back by now. A thread that waits for a dead server or disk cannot be
    ended, and Python would wait for it.
    """
    timer = threading.Timer(LEAVE_WITHIN, os._exit, (status,))
    timer.daemon = True
    timer.start()


async def _beat(health: Health) -> None:
    while True:
        health.beat()
        await asyncio.sleep(1)


async def finish(coroutine: Awaitable[Any], within: float) -> None:
    """Await some last work on the way out, for `within` seconds at most."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.ensure_future(coroutine), within)


def _help(name: str, settings_class: type[Settings]) -> None:
    """Handle ``--help`` and ``--version``; a service takes no other arguments."""
    parser = argparse.ArgumentParser(
        prog=f"crashbus {name}",
        description=settings_class.__doc__,
        epilog=_settings_text(settings_class),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"crashbus {VERSION}")
    parser.parse_args()


def _settings_text(settings_class: type[Settings]) -> str:
    lines = ["settings (environment variables; see docs/operations.md for the file):"]
    for cls in (settings_class, BusSettings):
        for field, info in cls.model_fields.items():
            default = "" if info.default in (None, PydanticUndefined, ()) else info.default
            if isinstance(default, tuple):
                default = ",".join(default)  # as it is given
            shown = f" (default: {default})" if default != "" else ""
            lines.append(f"  {variable_of(cls, field)}{shown}")
            lines.append(f"      {info.description}")
    return "\n".join(lines)
