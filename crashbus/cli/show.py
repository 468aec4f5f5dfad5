"""``crashbus show``: all that is known of one crash."""

import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.text import Text

from crashbus import Receipt
from crashbus.cli.crashes import Crash, State, newest_receipts
from crashbus.cli.download import contents, from_any_copy
from crashbus.cli.errors import Trouble
from crashbus.cli.get import CrashIdArgument, FromUrl
from crashbus.cli.lookup import Copy, Found, find
from crashbus.cli.tail import line
from crashbus.cli.terminal import console, moment, plain, print_json, size, table
from crashbus.layout import BINARIES, SHARED, Kind
from crashbus.parts import CrashFile, Process

_MAX_BACKTRACE = 256 * 1024  # bytes shown; get fetches all of it


def show(
    crash: CrashIdArgument,
    from_url: FromUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show one crash: its event, process, files, backtrace, and where it was shipped."""
    found = find(crash, from_url, with_events=True)
    state = State.DELIVERED if from_url else found.crash.state(time.time())
    backtraces = dict(_backtraces(found))
    if as_json:
        print_json(_as_json(found.crash, state, backtraces))
        return
    _print_head(found.crash, state)
    _print_events(found.crash)
    _print_files(found)
    _print_waiting(found.crash)
    _print_failures(found.crash)
    for name, text in backtraces.items():
        _heading(name)
        _print(plain(text.rstrip("\n"), lines=True))


def _as_json(crash: Crash, state: State, backtraces: dict[str, str]) -> dict[str, Any]:
    return {
        "crash_id": crash.crash_id,
        "state": state.value,
        "manifest": crash.manifest,
        "events": crash.events,
        "receipts": crash.receipts,
        "failures": crash.failures,
        "waiting": crash.waiting(),
        "backtraces": backtraces,
    }


def _backtraces(found: Found) -> Iterator[tuple[str, str]]:
    """Yield name and text of each backtrace; why it cannot be read stands in its place."""
    files = found.crash.manifest.files if found.crash.manifest else ()
    for file in files:
        if file.kind is Kind.BACKTRACE:
            try:
                yield file.name, _text(found, file)
            except Trouble as trouble:
                yield file.name, f"({trouble})"


def _text(found: Found, file: CrashFile) -> str:
    def read(copy: Copy, key: str) -> bytes:
        data = bytearray()
        for block in contents(copy, key, file):
            data += block[: _MAX_BACKTRACE - len(data)]
        return bytes(data)

    text = from_any_copy(found, file, read).decode("utf-8", "backslashreplace")
    rest = file.size - _MAX_BACKTRACE
    return f"{text}\n… and {size(rest)} more" if rest > 0 else text


def _print(text: str | Text) -> None:
    console().print(text, soft_wrap=True)


def _heading(text: str) -> None:
    _print(Text(f"\n{plain(text)}", "bold"))


def _print_head(crash: Crash, state: State) -> None:
    _print(Text(f"Crash {crash.crash_id}: {state}", "bold"))
    shown = table("", "")
    shown.show_header = False
    for name, value in _head(crash):
        shown.add_row(Text(f"  {name}", "dim"), plain(value))
    shown.columns[1].no_wrap, shown.columns[1].overflow = False, "fold"
    console().print(shown)


def _head(crash: Crash) -> Iterator[tuple[str, str]]:
    yield "time", moment(crash.time)
    yield "host", crash.host
    source = crash.manifest or (crash.events[-1] if crash.events else None)
    if source is None:
        return
    yield "process", crash.process
    yield from _process(source.process)
    yield "signal", f"{source.signal_name} ({source.signal}) {source.code_meaning or ''}".rstrip()
    if source.fault_address is not None:
        yield "fault address", f"{source.fault_address:#x}"
    if crash.manifest and crash.manifest.fingerprint:
        yield "fingerprint", crash.manifest.fingerprint
    if crash.manifest and crash.manifest.build_fingerprint:
        yield "of this build", crash.manifest.build_fingerprint
    for note in crash.manifest.notes if crash.manifest else ():
        yield "note", note


def _process(process: Process) -> Iterator[tuple[str, str]]:
    yield "executable", process.executable or "unknown"
    yield "command line", " ".join(process.command_line)
    yield "user", f"{process.uid}:{process.gid}"
    if process.container:
        named = (process.container.name, process.container.image)
        yield (
            "container",
            " ".join((process.container.runtime, process.container.id, *filter(None, named))),
        )
    elif process.cgroup:
        yield "cgroup", process.cgroup


def _print_events(crash: Crash) -> None:
    if crash.events:
        _heading("Events")
    for event in crash.events:
        _print(Text("  ") + line(event))


def _print_files(found: Found) -> None:
    manifest = found.crash.manifest
    if manifest is None or not manifest.files:
        return
    _heading("Files")
    receipts = newest_receipts(found.crash.receipts)
    for file in (one for one in manifest.files if one.kind not in SHARED):
        _print(f"  {file.name}  {size(file.size)}  sha256 {file.sha256}")
        if file.note or file.truncated:
            _print(f"      {'truncated: ' if file.truncated else ''}{plain(file.note or '')}")
        for place in _where(found, file, receipts.get(file.name, [])):
            _print(Text(f"      {plain(place)}", "dim"))

    binaries = [file for file in manifest.files if file.kind in SHARED]
    if binaries:
        total = size(sum(file.size for file in binaries))
        _print(f"  and the first to bring {len(binaries)} binaries, {total}, below {BINARIES}/")


def _where(found: Found, file: CrashFile, receipts: list[Receipt]) -> list[str]:
    if receipts or found.crash.receipts:
        return [receipt.url for receipt in receipts] or ["not shipped yet"]
    return [f"{copy.source.url}/{copy.keys(file)[0]}" for copy in found.copies]


def _print_waiting(crash: Crash) -> None:
    waiting = crash.waiting()
    if waiting:
        _heading("Tried again later")
    for one in waiting:
        _print(
            Text.assemble(
                f"  {moment(one.time)}  ",
                (f"{one.reason} ", "yellow"),
                plain(f"{' '.join(one.files)} to {one.destination}: {one.error}"),
                f"\n      {one.attempts} tries; next not before {moment(one.next_try)}, "
                f"given up after {moment(one.given_up)}",
                (f"\n      mend: {plain(one.mend)}", "bold"),
            )
        )


def _print_failures(crash: Crash) -> None:
    if crash.failures:
        _heading("Failures")
    for letter in crash.failures:
        places = sorted({place for place, _ in letter.given_up()})
        files = " ".join(sorted({name for _, name in letter.given_up()}))
        what = f"{files} to {', '.join(places)}: " if places else ""
        _print(
            Text.assemble(
                f"  {moment(letter.time)}  ",
                (f"{plain(letter.service)}: {letter.reason} ", "red"),
                plain(f"{what}{letter.error}"),
                (f"\n      mend: {plain(letter.mend)}", "bold"),
            )
        )
    if any(crash.unanswered(letter) for letter in crash.failures):
        _print(f"  once that is mended: crashbus retry {crash.crash_id}")
