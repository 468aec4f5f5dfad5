"""``crashbus ls``: the crashes there are."""

import time
from collections.abc import Iterator
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
    dest: Annotated[
        str | None, typer.Option(help="Read this destination (s3://…, file:///…), not the bus.")
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="How many to show.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List crashes, newest first."""
    if failed and dest:
        raise Trouble("only the bus knows what failed", "leave out --dest, or --failed")
    now = time.time()
    rows = _from_destination(dest, host) if dest else _from_bus(host, now)
    shown = islice((row for row in rows if not failed or row["state"] == State.FAILED), number)
    if as_json:
        for row in shown:
            print_json(row)
    else:
        _print_table(list(shown))


def _from_bus(host: str | None, now: float) -> Iterator[dict[str, Any]]:
    for crash in stored_crashes(host):
        yield row(crash, crash.state(now))


def _from_destination(url: str, host: str | None) -> Iterator[dict[str, Any]]:
    """A manifest is the last file to be delivered, so where it lies all the others do."""
    source = store.open_store(url)
    for place in source.places(host):
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
