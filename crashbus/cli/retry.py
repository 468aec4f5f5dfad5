"""``crashbus retry``: deliver again what failed for good, once its cause is mended."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import typer

from crashbus import DeadLetter, Replay
from crashbus.cli.bus import connected, read_crashes, read_named
from crashbus.cli.crashes import Crash
from crashbus.cli.errors import Trouble
from crashbus.cli.terminal import console, plain, print_json

_FILES_AT_ONCE = 64  # as the wire contract has it
_NOTHING = "crashbus ls --failed shows what has failed"


@dataclass(frozen=True)
class Wanted:
    """Which dead letters are meant; what is not given lets all pass."""

    reason: str | None = None
    destination: str | None = None
    host: str | None = None

    def means(self, letter: DeadLetter) -> bool:
        """Tell whether a dead letter is one of them, if it is for their destination."""
        return self.reason in (None, letter.reason) and self.host in (None, letter.host)


def retry(
    crash: Annotated[
        list[str] | None, typer.Argument(help="Crash IDs, or the first characters of each.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Everything that failed.")] = False,
    reason: Annotated[str | None, typer.Option(help="Only what failed for this reason.")] = None,
    dest: Annotated[str | None, typer.Option(help="Only what was for this destination.")] = None,
    host: Annotated[str | None, typer.Option(help="Only crashes of this host.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Deliver again what failed for good, once you have mended the cause.

    The crashed host keeps the files until then.
    """
    given = crash or []
    if bool(given) is every:
        raise Trouble("say what to retry", "give crash IDs, or --all (with --reason, --dest, …)")
    asked = asyncio.run(_retry(given, Wanted(reason, dest, host)))
    if not asked:
        raise Trouble("nothing that a retry could deliver has failed so", _NOTHING)
    for one in asked:
        if as_json:
            print_json(one)
            continue
        console().print(
            plain(f"{one.crash_id}: {len(one.files)} file(s) again to {one.destination}"),
            soft_wrap=True,
        )


async def _retry(given: list[str], wanted: Wanted) -> list[Replay]:
    async with connected() as bus:
        crashes = await (
            read_named(bus, given, wanted.host) if given else read_crashes(bus, wanted.host)
        )
        asked = [one for crash in crashes for one in replays(crash, wanted)]
        for replay in asked:
            await bus.publish(replay)
    return asked


def replays(crash: Crash, wanted: Wanted) -> list[Replay]:
    """Return what is to be asked of a crash's collector so that all that failed is delivered."""
    failed: dict[str, dict[str, DeadLetter]] = defaultdict(dict)
    for letter in filter(wanted.means, crash.failures):
        for destination, name in sorted(crash.unanswered(letter)):
            if wanted.destination in (None, destination):
                failed[destination][name] = letter
    return [
        Replay(
            host=crash.host,
            crash_id=crash.crash_id,
            destination=destination,
            files=tuple(names),
            failed_at=max(letters[name].time for name in names),
        )
        for destination, letters in failed.items()
        for names in _some_at_a_time([*letters])
    ]


def _some_at_a_time(names: list[str]) -> Iterable[list[str]]:
    for start in range(0, len(names), _FILES_AT_ONCE):
        yield names[start : start + _FILES_AT_ONCE]
