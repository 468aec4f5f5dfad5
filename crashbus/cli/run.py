"""``crashbus run``: every service and a private nats-server on this host."""

import asyncio
import logging
import os
import shutil
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from crashbus.cli import supervisor
from crashbus.cli.errors import WrongSetup
from crashbus.cli.supervisor import SERVICES, Supervisor
from services.common import log as logs
from services.common.bus_settings import BusSettings

_OWN_PORT = 4222


def run(
    dest: Annotated[
        list[str] | None,
        typer.Option(
            "--dest",
            help="Where crash files go: s3://bucket/prefix, tcp://host:port, tls://host:port or"
            " file:///directory. Give it several times for several places.",
        ),
    ] = None,
    shippers: Annotated[int, typer.Option(help="How many shippers share the work.", min=1)] = 1,
    port: Annotated[
        int, typer.Option(help="Port of the private nats-server, on loopback.")
    ] = _OWN_PORT,
    nats: Annotated[
        bool,
        typer.Option("--nats/--no-nats", help="Start a private nats-server, or use a running one."),
    ] = True,
    logs_to: Annotated[
        Path | None,
        typer.Option("--logs", help="Write each service's log to a file in this directory."),
    ] = None,
) -> None:
    """Run all services here: from now on every crash on this host is captured and delivered."""
    # Only here: no other command needs what the recorder needs.
    from services.recorder import guard
    from services.recorder.settings import RecorderSettings

    if dest:
        os.environ["CRASHBUS_DESTINATIONS"] = ",".join(dest)
    if nats:
        _mean_own_bus(port)
    environment = dict(os.environ)
    settings, socket = BusSettings.load(), RecorderSettings.load().socket
    _check(settings, port if nats else None, logs_to)
    for handler in logging.getLogger("crashbus").handlers[:]:
        logging.getLogger("crashbus").removeHandler(handler)  # the services' form from here on
    logging.getLogger("crashbus").propagate = True
    logs.configure(settings.log_level, settings.log_format, "run")

    async def start(together: Supervisor) -> None:
        if nats:
            await _start_nats(together, settings, port, logs_to)
        await _start_services(together, environment, shippers, logs_to)

    try:
        asyncio.run(_supervise(start))
    finally:
        # The recorder has done so itself, unless it was killed and was not back yet.
        guard.put_back(settings.state, last=socket)


def _mean_own_bus(port: int) -> None:
    """Forget keys, certificates and replicas of another bus, which this host's units may have."""
    for name in [name for name in os.environ if name.startswith("CRASHBUS_NATS_")]:
        del os.environ[name]
    os.environ["CRASHBUS_NATS_URL"] = f"nats://127.0.0.1:{port}"


def _check(settings: BusSettings, port: int | None, logs_to: Path | None) -> None:
    """See that this host has what it takes.

    Args:
        port: of the nats-server to be started, if one is.
    """
    if not settings.destinations:
        raise WrongSetup("no destination is set", "give --dest file:///var/crashes or s3://bucket")
    if os.geteuid() != 0:
        raise WrongSetup("eBPF and core_pattern need root", "run it with sudo")
    if port is not None and shutil.which("nats-server") is None:
        mend = "apt-get install nats-server, or --no-nats"
        raise WrongSetup("nats-server is not installed", mend)
    if port is not None and not supervisor.is_free(port):
        raise WrongSetup(
            f"port {port} of 127.0.0.1 is taken, perhaps by another nats-server",
            "give --port another, or --no-nats to use the server that CRASHBUS_NATS_URL names",
        )
    if logs_to is not None:
        try:
            logs_to.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot make {logs_to}: {error.strerror}"
            raise WrongSetup(what, "give --logs another directory") from error


async def _supervise(start: Callable[[Supervisor], Coroutine[Any, Any, None]]) -> None:
    """Start what is to run, and see to it until it gives up or we are to stop.

    Raises:
        Trouble: it cannot be started, or gave up.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for ending in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(ending, stop.set)
    together = Supervisor()
    starting = asyncio.create_task(start(together))
    stopping = asyncio.create_task(stop.wait())
    ends: set[asyncio.Future[Any]] = {stopping, together.given_up}
    try:
        await asyncio.wait({starting, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if together.given_up.done():
            raise WrongSetup(together.given_up.result(), "its log says which setting is wrong")
    finally:
        starting.cancel()
        await asyncio.wait({starting})
        await together.stop()


async def _start_nats(
    together: Supervisor, settings: BusSettings, port: int, logs_to: Path | None
) -> None:
    log = _log_file(logs_to, "nats-server")
    command = supervisor.nats_command(settings.state / "nats", port, log)
    await together.start(command)
    await together.until_answers(command.name, settings.nats_url)


async def _start_services(
    together: Supervisor, environment: dict[str, str], shippers: int, logs_to: Path | None
) -> None:
    for name in SERVICES:
        for number in range(1, (shippers if name == "shipper" else 1) + 1):
            await together.start(
                supervisor.service_command(name, number, environment, _log_file(logs_to, name))
            )


def _log_file(directory: Path | None, name: str) -> Path | None:
    return directory / f"{name}.log" if directory else None
