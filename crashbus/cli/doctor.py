"""``crashbus doctor``: what this host can and cannot do, and what would mend it."""

import asyncio
import importlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import nats.errors
import nats.js.errors
import structlog
import typer
from nats.js import JetStreamContext
from rich.text import Text

from crashbus import chunks, destination, streams
from crashbus.cli import engine
from crashbus.cli.bus import MEND_KEYS
from crashbus.cli.terminal import console, moment, plain, print_json, size
from crashbus.client import RENEW_BEFORE, Client
from crashbus.destination import Destination, DestinationError
from services.common.bus_settings import BusSettings
from services.common.finding import Finding
from services.common.settings import SettingsError
from services.shipper.settings import ShipperSettings

_TIMEOUT = 3.0  # seconds for a server to answer; a person is waiting
_MEND_SETTINGS = "set the variable as it says"
_MEND_SHIPPER = "pip install 'crashbus[shipper]'"
_MEND_TLS = "renew it where nats-server runs, deploy/nats/make-certificates.sh"
_LEAST_FREE = 1024**3  # bytes; the bus's store may lie there, too


def doctor(
    dest: Annotated[
        list[str] | None,
        typer.Option(help="A destination to look at, instead of the configured ones."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Say what this host can and cannot do; exit with 1 if something is wrong."""
    # What the services' parts would log, the findings say.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    wrong = 0
    for finding in findings(tuple(dest or ())):
        wrong += not finding.ok
        if as_json:
            print_json(asdict(finding))
        else:
            _print(finding)
    if wrong:
        raise typer.Exit(1)


def _print(finding: Finding) -> None:
    mark = ("ok   ", "green") if finding.ok else ("WRONG", "bold red")
    detail = plain(f"{finding.name}: {finding.detail}")
    console().print(Text.assemble(mark, "  ", detail), soft_wrap=True)
    if finding.mend and not finding.ok:
        console().print(Text(f"       mend: {plain(finding.mend)}", "bold"), soft_wrap=True)


def findings(given: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Look at everything, one thing after the other.

    Args:
        given: destinations to look at instead of the configured ones.
    """
    yield from _of_service("detector")
    yield from _of_service("recorder")
    yield from engine.findings()
    try:
        settings = BusSettings.load()
        options = settings.connection_options("crashbus-doctor")
    except SettingsError as error:
        yield Finding("settings", False, str(error), _MEND_SETTINGS)
        return
    yield from asyncio.run(_nats(settings.nats_url, options))
    yield _state(settings.state)
    for url in given or settings.destinations:
        yield _destination(url)


def _of_service(service: str) -> list[Finding]:
    """Return what a service says of this host; each service knows its own needs."""
    try:
        check: Callable[[], list[Finding]] = importlib.import_module(
            f"services.{service}.requirements"
        ).check
    except ModuleNotFoundError as error:
        mend = f"to run it here: pip install 'crashbus[{service}]'"
        return [Finding(service, False, f"{error.name} is not installed", mend)]
    try:
        return check()
    except SettingsError as error:
        return [Finding(f"settings of the {service}", False, str(error), _MEND_SETTINGS)]


async def _nats(url: str, options: dict[str, Any]) -> list[Finding]:
    servers = [part.strip() for part in url.split(",")]
    errors: list[str] = []

    async def note(error: Exception) -> None:
        errors.append(f"{type(error).__name__} {error}".strip())

    client = Client()
    try:
        await asyncio.wait_for(
            client.connect(
                servers,
                connect_timeout=int(_TIMEOUT),
                allow_reconnect=False,
                max_reconnect_attempts=1,  # 0 would mean for ever
                reconnect_time_wait=0,
                error_cb=note,
                **options,
            ),
            _TIMEOUT * len(servers),
        )
    except (nats.errors.Error, OSError, TimeoutError) as error:
        await note(error)
        return [Finding("nats", False, f"no connection: {errors[0]}", _mend_nats(errors[0]))]
    try:
        js = client.jetstream(timeout=_TIMEOUT)
        return [
            Finding("nats", True, f"connected, messages up to {size(client.max_payload)}"),
            *_certificate(client.certificate_end),
            _payload(client.max_payload),
            await _jetstream(js, errors),
        ]
    finally:
        await client.close()


def _mend_nats(error: str) -> str:
    if "uthorization" in error:
        return MEND_KEYS
    if "CERTIFICATE" in error:
        return f"{_MEND_TLS}, or let CRASHBUS_NATS_CA_FILE name the CA of its certificate"
    return "start nats-server with JetStream, or set CRASHBUS_NATS_URL"


def _certificate(end: float | None) -> list[Finding]:
    if end is None:
        return []
    detail = f"the server's ends {moment(end)}"
    return [Finding("nats certificate", end - time.time() > RENEW_BEFORE, detail, _MEND_TLS)]


def _payload(max_payload: int) -> Finding:
    try:
        chunk = chunks.chunk_size(max_payload)
    except ValueError as error:
        return Finding("nats max_payload", False, str(error), "set max_payload in its config")
    return Finding("nats max_payload", True, f"chunks of {size(chunk)}")


async def _jetstream(js: JetStreamContext, errors: list[str]) -> Finding:
    wanted = [str(one.name) for one in streams.all_streams(0)]
    missing = []
    try:
        for name in wanted:
            try:
                await js.stream_info(name)
            except nats.js.errors.NotFoundError:
                missing.append(name)
    except (nats.errors.Error, TimeoutError) as error:
        if any("permissions violation" in one for one in errors):
            return Finding("jetstream", True, "our key may not look at its streams")
        return Finding(
            "jetstream", False, f"off: {type(error).__name__}", "start nats-server with -js"
        )
    if not missing:
        return Finding("jetstream", True, f"all {len(wanted)} streams are there")
    return Finding("jetstream", True, f"on; a collector will make {', '.join(sorted(missing))}")


def _state(directory: Path) -> Finding:
    free = shutil.disk_usage(_existing(directory)).free
    mend = "free some space there, or set CRASHBUS_STATE"
    return Finding("state", free >= _LEAST_FREE, f"{directory}: {size(free)} free", mend)


def _existing(path: Path) -> Path:
    """Return the nearest directory above (or at) a path that exists."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _destination(url: str) -> Finding:
    name = f"destination {url}"
    try:
        parsed = destination.parse(url)
    except DestinationError as error:
        return Finding(name, False, str(error), "write it as it says")
    directory = Path(parsed.path)
    if parsed.scheme == "file" and not directory.is_dir():
        return _not_yet(name, directory)
    return asyncio.run(_ready(name, parsed))


def _not_yet(name: str, directory: Path) -> Finding:
    """See whether the shipper could make a directory, without making it."""
    above = _existing(directory)
    try:
        with tempfile.TemporaryFile(dir=above):
            return Finding(name, True, f"not there yet, can be made in {above}")
    except OSError as error:
        mend = "make it writable for the shipper, or take another directory"
        return Finding(name, False, f"cannot be made in {above}: {error.strerror}", mend)


async def _ready(name: str, parsed: Destination) -> Finding:
    """Ask the shipper's own part for this kind of destination whether it could deliver."""
    try:
        from services.shipper.destinations import deliverer
        from services.shipper.failure import Failure
    except ModuleNotFoundError as error:
        return Finding(name, False, f"{error.name} is not installed", _MEND_SHIPPER)
    try:
        settings = ShipperSettings.load().model_copy(update={"s3_create_bucket": False})
        await deliverer(parsed, settings).check()
    except Failure as error:
        return Finding(name, False, str(error), error.mend)
    except SettingsError as error:
        return Finding(name, False, str(error), _MEND_SETTINGS)
    return Finding(name, True, "ready")
