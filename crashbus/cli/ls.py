"""``crashbus ls``: the crashes there are."""

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any

import typer
from rich.text import Text

from crashbus.cli import store
from crashbus.cli.bus import stored_crashes
from crashbus.cli.crashes import Crash, State
from crashbus.cli.errors import Trouble
from crashbus.cli.terminal import console, moment, plain, print_json, size, table
from crashbus.layout import SHARED

_COLOURS = {
    State.DELIVERED: "green",
    State.DELIVERING: "cyan",
    State.FAILED: "bold red",
    State.NOT_CAPTURED: "yellow",
}


def ls(
    host: Annotated[str | None, typer.Option(help="Only crashes of this host.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only crashes that failed.")] = False,
    since: Annotated[
        str | None, typer.Option(help="Only from then on: 2h, 7d, or a day or time of UTC.")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="Only of this bug: the whole fingerprint or its beginning.")
    ] = None,
    from_url: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="URL", help="Read this destination (s3://…, file:///…), not the bus."
        ),
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="How many to show.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List crashes, newest first."""
    if failed and from_url:
        raise Trouble("only the bus knows what failed", "leave out --from, or --failed")
    now = time.time()
    after = None if since is None else moment_given(since, now)
    rows = _from_destination(from_url, host, after) if from_url else _from_bus(host, after, now)
    if failed:
        rows = (row for row in rows if row["state"] == State.FAILED)
    if fingerprint is not None:
        rows = (row for row in rows if _is_of(row, fingerprint.strip().lower()))
    shown = islice(rows, number)
    if as_json:
        for row in shown:
            print_json(row)
    else:
        _print_table(list(shown))


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def moment_given(text: str, now: float) -> float:
    """Return the Unix time that is meant.

    Raises:
        Trouble: none is.
    """
    if ago := re.fullmatch(r"(\d{1,9})([smhdw])", text.strip()):
        return now - int(ago[1]) * _UNITS[ago[2]]
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        raise Trouble(
            f"{plain(text)!r} is no time", "give 2h, 7d, 2026-11-23 or 2026-11-23T01:15:43Z"
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _is_of(row: dict[str, Any], fingerprint: str) -> bool:
    found = (row["fingerprint"], row["build_fingerprint"])
    return any(one is not None and one.startswith(fingerprint) for one in found)


def _from_bus(host: str | None, since: float | None, now: float) -> Iterator[dict[str, Any]]:
    for crash in stored_crashes(host, since):
        yield row(crash, crash.state(now))


def _from_destination(url: str, host: str | None, since: float | None) -> Iterator[dict[str, Any]]:
    """A manifest is the last file to be delivered, so where it lies all the others do."""
    source = store.open_store(url)
    for place in source.places(host):
        if since is not None and place.crashed_at < since:
            return  # the newest come first
        try:
            crash = Crash(place.crash_id, source.manifest(place))
        except store.NotThere:
            yield _row_of_place(place)
        except store.UnreadableManifest as error:
            console(stderr=True).print(plain(f"crashbus: passed over: {error}"))
        else:
            yield row(crash, State.DELIVERED)


def row(crash: Crash, state: State) -> dict[str, Any]:
    """Return what the list tells of a crash; time in Unix seconds, size in bytes."""
    all_files = crash.manifest.files if crash.manifest else ()
    files = [file for file in all_files if file.kind not in SHARED]
    return {
        "time": crash.time,
        "crash_id": crash.crash_id,
        "host": crash.host,
        "process": crash.process,
        "signal": crash.signal_name,
        "fingerprint": crash.manifest.fingerprint if crash.manifest else None,
        "build_fingerprint": crash.manifest.build_fingerprint if crash.manifest else None,
        "files": len(files),
        "size": sum(file.size for file in files),
        "state": state.value,
    }


def _row_of_place(place: store.Place) -> dict[str, Any]:
    return {
        "time": place.crashed_at,
        "crash_id": place.crash_id,
        "host": place.host,
        "process": place.process_name,
        "signal": "",
        "fingerprint": None,
        "build_fingerprint": None,
        "files": 0,
        "size": 0,
        "state": State.DELIVERING.value,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        console(stderr=True).print("no crashes")
        return
    shown = table("TIME", "CRASH", "HOST", "PROCESS", "SIGNAL", "FILES", "SIZE", "STATE")
    shown.columns[0].min_width, shown.columns[1].min_width = 20, 16
    for one in rows:
        shown.add_row(
            moment(one["time"]),
            one["crash_id"],
            plain(one["host"]),
            plain(one["process"]),
            plain(one["signal"]),
            str(one["files"] or ""),
            size(one["size"]) if one["files"] else "",
            Text(one["state"], _COLOURS[State(one["state"])]),
        )
    console().print(shown)
