"""``crashbus tail``: what goes over the bus, as it happens."""

import asyncio
from enum import StrEnum
from typing import Annotated

import typer
from rich.text import Text

from crashbus import (
    Bus,
    DeadLetter,
    Manifest,
    Message,
    Postponed,
    Receipt,
    Replay,
    SignalCount,
    SignalEvent,
)
from crashbus.cli.bus import connected
from crashbus.cli.errors import Trouble
from crashbus.cli.terminal import console, moment, plain, print_json, size
from crashbus.errors import NoStreams
from crashbus.messages import EventsLost


class Kinds(StrEnum):
    """What to follow."""

    SIGNALS = "signals"
    REPORTS = "reports"
    RECEIPTS = "receipts"
    FAILURES = "failures"
    POSTPONED = "postponed"
    RETRIES = "retries"
    ALL = "all"


_FOLLOWED: dict[Kinds, tuple[type[Message], ...]] = {
    Kinds.SIGNALS: (SignalEvent, SignalCount, EventsLost),
    Kinds.REPORTS: (Manifest,),
    Kinds.RECEIPTS: (Receipt,),
    Kinds.FAILURES: (DeadLetter,),
    Kinds.POSTPONED: (Postponed,),
    Kinds.RETRIES: (Replay,),
}
_FOLLOWED[Kinds.ALL] = tuple(kind for kinds in _FOLLOWED.values() for kind in kinds)


_LATELY = (Postponed, Replay)  # services of an older version make no stream for them
_LOOK_AGAIN = 5.0  # seconds until it is seen whether newer ones have made it


def tail(
    subject: Annotated[
        str | None, typer.Argument(help="Such as crash.signal.web1.> or 'crash.*.web1.>'.")
    ] = None,
    kind: Annotated[Kinds, typer.Option("--kind", "-k", help="What to follow.")] = Kinds.ALL,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Follow crashes as they happen, and what becomes of their files."""
    asyncio.run(_tail(subscriptions(kind, subject), as_json))


def subscriptions(kind: Kinds, subject: str | None) -> list[tuple[type[Message], str]]:
    """Return which message to expect on which subject.

    Raises:
        Trouble: nothing of that kind is ever published there.
    """
    if subject is None:
        return [(message, message.SUBJECT) for message in _FOLLOWED[kind]]
    first, _, rest = subject.partition(".")
    second, _, places = rest.partition(".")
    found = []
    for message in _FOLLOWED[kind]:
        own = message.SUBJECT.split(".")[1]
        if subject in (">", "crash.>", "*.>"):
            found.append((message, message.SUBJECT))
        elif first in ("crash", "*") and second in (own, "*") and places:
            found.append((message, f"crash.{own}.{places}"))
    if not found:
        raise Trouble(
            f"no {'messages' if kind is Kinds.ALL else kind} to follow on {plain(subject)!r}",
            "they are crash.signal.>, count, lost, report, shipped, failed, postponed and retry",
        )
    return found


async def _tail(wanted: list[tuple[type[Message], str]], as_json: bool) -> None:
    async with connected() as bus:
        alone = len(wanted) == 1
        await asyncio.gather(
            *(
                _follow(bus, kind, subject, as_json, may_lack=kind in _LATELY and not alone)
                for kind, subject in wanted
            )
        )


async def _follow(
    bus: Bus, kind: type[Message], subject: str, as_json: bool, *, may_lack: bool
) -> None:
    while True:
        try:
            async for message in bus.subscribe(kind, subject):
                if as_json:
                    print_json({"message": kind.__name__, **message.model_dump(mode="json")})
                else:
                    console().print(line(message), soft_wrap=True)
        except NoStreams:
            if not may_lack:
                raise
        await asyncio.sleep(_LOOK_AGAIN)


def line(message: Message) -> Text:
    """Return a message in one line."""
    at = moment(message.time)[11:]
    text = Text.assemble((at, "dim"), "  ", (f"{plain(message.host)}  ", "bold"))
    match message:
        case SignalEvent():
            _signal(text, message)
        case SignalCount():
            text.append(f"{plain(message.signal_name)} handled {message.count} more times by ")
            text.append(plain(f"{message.process.comm}[{message.process.pid}]"))
        case EventsLost():
            text.append(f"{message.count} signal events lost ({message.stage})", "bold red")
        case Manifest():
            text.append("reported ", "cyan")
            text.append(plain(f"{message.process_name}[{message.process.pid}] "))
            text.append(f"{plain(message.signal_name)}, {len(message.files)} files, ")
            text.append(size(sum(file.size for file in message.files)))
        case Receipt():
            text.append("shipped ", "green")
            text.append(f"{message.file.name} {size(message.file.size)} to {plain(message.url)}")
        case DeadLetter():
            text.append(f"failed {plain(message.service)} {message.reason}: ", "bold red")
            text.append(f"{plain(message.error)}; {plain(message.mend)}")
        case Postponed():
            text.append(f"postponed {message.reason}: ", "yellow")
            text.append(plain(f"{' '.join(message.files)} to {message.destination}: "))
            text.append(f"{plain(message.error)}; next try {moment(message.next_try)[11:]}")
        case Replay():
            text.append("asked for again ", "cyan")
            text.append(plain(f"{' '.join(message.files)} to {message.destination}"))
    if crash_id := getattr(message, "crash_id", None):
        text.append(f"  {crash_id}", "dim")
    return text


_COLOURS = {"default": "bold red", "handled": "yellow", "oom_kill": "bold magenta"}
_MEANINGS = {"default": "dies", "handled": "handles it", "oom_kill": "killed, out of memory"}


def _signal(text: Text, event: SignalEvent) -> None:
    process = event.process
    text.append(f"{plain(event.signal_name)} ", _COLOURS[event.disposition])
    text.append(plain(f"{process.comm}[{process.pid}] "))
    text.append(f"{_MEANINGS[event.disposition]}: {plain(event.code_meaning)}")
    if event.fault_address is not None:
        text.append(f" at {event.fault_address:#x}")
    if event.sender:
        text.append(f", sent by process {event.sender.pid}")
    if process.executable:
        text.append(f"  {plain(process.executable)}", "dim")
