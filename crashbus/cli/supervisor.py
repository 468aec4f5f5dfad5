"""All of Crashbus on one host without containers: nats-server and the services, supervised.

Each runs as a process of its own, as it would in a container, so that one that fails takes
nothing else down. What ends by itself is started again, ever more slowly.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from crashbus.cli.errors import EXIT_SETTINGS, Trouble
from crashbus.connecting import connect
from crashbus.errors import BusUnreachable

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SERVICES = ("recorder", "detector", "shipper", "collector")
STOP_WITHIN = 12.0  # seconds; a service promises to be gone within 10
_FIRST_WAIT = 0.5  # seconds before what ended is started again; doubled each time
_LONGEST_WAIT = 30.0
_STEADY_AFTER = 60.0  # seconds; after that, the next failure counts as the first
# Seconds for nats-server to answer. After a kill it reads its whole store first, which may be
# many GiB on a slow disk; while it lives, there is nothing better to do than to wait.
_READY_WITHIN = 600.0
# Should the supervisor be killed, the kernel sends SIGTERM to what it started, prctl(2).
_ENDS_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")


@dataclass(frozen=True)
class Command:
    """A process to keep running.

    Attributes:
        is_service: it ends with `EXIT_SETTINGS` where a setting is wrong. What is written in Go
            ends so when it panics.
    """

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path | None
    is_service: bool = False


class Supervisor:
    """Starts commands in order, keeps them running, and stops them in the opposite order."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.given_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, command: Command) -> None:
        """Start a command and keep it running until `stop`."""
        process = await _start(command)
        self._running[command.name] = process
        self._tasks.append(asyncio.create_task(self._keep(command, process), name=command.name))

    async def _keep(self, command: Command, process: asyncio.subprocess.Process) -> None:
        wait = _FIRST_WAIT
        while True:
            began = time.monotonic()
            status = await process.wait()
            if command.is_service and status == EXIT_SETTINGS:
                if not self.given_up.done():
                    self.given_up.set_result(f"{command.name} cannot work as it is set up")
                return
            if time.monotonic() - began > _STEADY_AFTER:
                wait = _FIRST_WAIT
            log.error("ended, starting again", name=command.name, status=status, seconds=wait)
            process, wait = await self._started_again(command, wait)

    async def _started_again(
        self, command: Command, wait: float
    ) -> tuple[asyncio.subprocess.Process, float]:
        """Start a command once that is possible; return it and how long to wait the next time."""
        while True:
            await asyncio.sleep(wait)
            wait = min(wait * 2, _LONGEST_WAIT)
            try:
                process = await _start(command)
            except Trouble as trouble:
                log.error("trying again", name=command.name, error=str(trouble), seconds=wait)
            else:
                self._running[command.name] = process
                return process, wait

    async def until_answers(self, name: str, url: str) -> None:
        """Return once the NATS server that was started under this name answers.

        Raises:
            Trouble: it ended, or was silent for minutes.
        """
        process, end = self._running[name], time.monotonic() + _READY_WITHIN
        while True:
            try:
                async with connect(url):
                    return
            except BusUnreachable as error:
                if process.returncode is not None:
                    reason = f"{name} ended with status {process.returncode}"
                elif time.monotonic() > end:
                    reason = f"{name} runs, but {error}"
                else:
                    continue
                raise Trouble(
                    reason, "see its log; another program may have the port, --port takes another"
                ) from error

    async def stop(self) -> None:
        """Stop everything; what does not listen is killed."""
        for task in self._tasks:
            task.cancel()
        servers = [p for name, p in self._running.items() if name == "nats-server"]
        await _end([p for name, p in self._running.items() if name != "nats-server"])
        # The bus goes last: the services put their last words on it.
        await _end(servers)


async def _start(command: Command) -> asyncio.subprocess.Process:
    output = None
    try:
        output = command.log.open("ab") if command.log else None
        # A session of its own: Ctrl-C reaches the supervisor alone, which stops all in order.
        return await asyncio.create_subprocess_exec(
            *_ENDS_WITH_US,
            *command.arguments,
            env=dict(command.environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    except OSError as error:
        mend = "make its log's directory" if command.log and output is None else "install it"
        raise Trouble(f"{command.name} cannot be started: {error}", mend) from error
    finally:
        if output is not None:
            output.close()


async def _end(processes: Sequence[asyncio.subprocess.Process]) -> None:
    living = [process for process in processes if process.returncode is None]
    for process in living:
        process.send_signal(signal.SIGTERM)
    waits = [asyncio.create_task(process.wait()) for process in living]
    if not waits:
        return
    _, late = await asyncio.wait(waits, timeout=STOP_WITHIN)
    for process in living:
        if process.returncode is None:
            process.kill()
    if late:
        await asyncio.wait(late)


def free_port() -> int:
    """Return a TCP port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Tell whether a server could listen on this port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections count not
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def nats_command(directory: Path, port: int, output: Path | None) -> Command:
    """Return the command of a private nats-server, loopback only, with its store on disk.

    Raises:
        Trouble: its configuration cannot be written.
    """
    config = directory / "nats.conf"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        config.write_text(
            f"listen: 127.0.0.1:{port}\n"
            "server_name: crashbus\n"
            "jetstream {\n"
            f'  store_dir: "{directory}"\n'
            "}\n"
        )
    except OSError as error:
        raise Trouble(
            f"cannot write {config}: {error.strerror}",
            "make room or let it be written to, or set CRASHBUS_STATE to another directory",
        ) from error
    return Command("nats-server", ("nats-server", "-c", str(config)), os.environ, output)


def service_command(
    name: str, number: int, environment: Mapping[str, str], output: Path | None
) -> Command:
    """Return the command of one service; of several alike, each has its number."""
    variable = f"CRASHBUS_{name.upper()}_HTTP"
    own = dict(environment)
    if number > 1:
        own[variable] = f"127.0.0.1:{free_port()}"
    label = name if number == 1 else f"{name}-{number}"
    return Command(label, (sys.executable, "-m", f"services.{name}"), own, output, is_service=True)
