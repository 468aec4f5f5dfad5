"""Crashes as a person thinks of them, put together from what the bus or a destination says."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from crashbus import (
    DeadLetter,
    Manifest,
    Postponed,
    Receipt,
    Replay,
    SignalEvent,
    destination,
)
from crashbus.cli.errors import Trouble
from crashbus.cli.terminal import plain
from crashbus.destination import DestinationError
from crashbus.parts import CrashFile

GATHERING = 120.0  # seconds from a deadly signal to the manifest, for the largest of cores
_SHOWN_CANDIDATES = 5


class State(StrEnum):
    """How far a crash has come."""

    DELIVERING = "delivering"
    DELIVERED = "delivered"
    FAILED = "failed"
    NOT_CAPTURED = "not captured"


@dataclass
class Crash:
    """One crash and all that is known of it; at least one of the parts is there."""

    crash_id: str
    manifest: Manifest | None = None
    events: list[SignalEvent] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    failures: list[DeadLetter] = field(default_factory=list)
    replays: list[Replay] = field(default_factory=list)
    postponed: list[Postponed] = field(default_factory=list)

    @property
    def host(self) -> str:
        return self._any.host

    @property
    def time(self) -> float:
        """Unix seconds of the crash, as near as is known."""
        if self.manifest:
            return self.manifest.crashed_at
        return self._any.time

    @property
    def process(self) -> str:
        """Name and PID, such as ``nginx[1234]``; empty when only receipts are known."""
        if not self.manifest and not self.events:
            return ""
        known = self.manifest.process if self.manifest else self.events[-1].process
        name = self.manifest.process_name if self.manifest else known.comm
        return f"{name}[{known.pid}]"

    @property
    def signal_name(self) -> str:
        if self.manifest:
            return self.manifest.signal_name
        return self.events[-1].signal_name if self.events else ""

    @property
    def _any(self) -> Manifest | SignalEvent | Receipt | DeadLetter:
        parts = (self.manifest, *self.events[:1], *self.receipts[:1], *self.failures[:1])
        return next(part for part in parts if part is not None)

    @property
    def is_crash(self) -> bool:
        """False for a process that handled a signal itself and about which nothing else came."""
        beyond_events = self.manifest or self.receipts or self.failures
        return bool(beyond_events) or any(
            event.fatal or (event.handler and event.handler.appscope) for event in self.events
        )

    def undelivered(self) -> set[tuple[str, str]]:
        """Return destination and name of each file that no receipt confirms as it should be."""
        if not self.manifest:
            return set()
        confirmed = {_delivery(receipt.destination, receipt.file) for receipt in self.receipts}
        return {
            (url, file.name)
            for url in self.manifest.destinations
            for file in self.manifest.files
            if _wanted(url, file) and _delivery(url, file) not in confirmed
        }

    def state(self, now: float) -> State:
        """Tell how far this crash has come, seen from the bus at the Unix time `now`."""
        if self.manifest and not self.manifest.files:
            return State.NOT_CAPTURED
        if any(self.stands(letter) for letter in self.failures):
            return State.FAILED
        if self.manifest and self.manifest.destinations and not self.undelivered():
            return State.DELIVERED
        if self.manifest or self.receipts or now - self.time < GATHERING:
            return State.DELIVERING
        return State.NOT_CAPTURED

    def stands(self, letter: DeadLetter) -> bool:
        """Whether what the letter tells of was neither put right since nor asked for again; one
        that names no files tells of a loss that no delivery puts right.
        """
        return not letter.given_up() or bool(self.unanswered(letter))

    def unanswered(self, letter: DeadLetter) -> set[tuple[str, str]]:
        """Return destination and name of each file of a letter for which there is neither a
        receipt nor a later request.
        """
        confirmed = {(r.destination, r.file.name) for r in self.receipts}
        asked = {
            (one.destination, name)
            for one in self.replays
            if letter.time <= one.failed_at
            for name in one.files
        }
        return letter.given_up() - confirmed - asked

    def waiting(self) -> list[Postponed]:
        """Return the deliveries that failed and are to be tried again."""
        confirmed = {(r.destination, r.file.name) for r in self.receipts}
        return [
            one
            for one in self.postponed
            if any((one.destination, name) not in confirmed for name in one.files)
            and not any(
                one.destination in dict(letter.given_up())
                for letter in self.failures
                if letter.time >= one.time
            )
        ]


def _delivery(url: str, file: CrashFile) -> tuple[str, str, int, str]:
    return url, file.name, file.size, file.sha256


def _wanted(url: str, file: CrashFile) -> bool:
    """Whether a destination takes this file; one that a newer Crashbus knows takes all."""
    try:
        return destination.parse(url).wants(file.kind)
    except DestinationError:
        return True


def join(
    manifests: Iterable[Manifest],
    events: Iterable[SignalEvent],
    receipts: Iterable[Receipt],
    failures: Iterable[DeadLetter],
    replays: Iterable[Replay] = (),
    postponed: Iterable[Postponed] = (),
) -> list[Crash]:
    """Put together what belongs to the same crash; newest crash first."""
    found: dict[str, Crash] = {}

    def crash(crash_id: str) -> Crash:
        return found.setdefault(crash_id, Crash(crash_id))

    for manifest in manifests:
        known = crash(manifest.crash_id)
        if known.manifest is None or known.manifest.revision <= manifest.revision:
            known.manifest = manifest
    for event in events:
        crash(event.crash_id).events.append(event)
    for receipt in receipts:
        crash(receipt.crash_id).receipts.append(receipt)
    for letter in failures:
        if letter.crash_id:
            crash(letter.crash_id).failures.append(letter)
    for replay in replays:
        if replay.crash_id in found:
            found[replay.crash_id].replays.append(replay)
    for one in postponed:
        if one.crash_id in found:
            found[one.crash_id].postponed.append(one)
    return sorted((c for c in found.values() if c.is_crash), key=lambda c: c.time, reverse=True)


def choose(crash_ids: Iterable[str], given: str, where: str) -> str:
    """Return the one crash ID that begins with `given`.

    Args:
        where: where the IDs are from, for the error.

    Raises:
        Trouble: there is none, or more than one.
    """
    wanted = given.strip().lower()
    matches = sorted({one for one in crash_ids if wanted and one.startswith(wanted)})
    if wanted in matches or len(matches) == 1:
        return wanted if wanted in matches else matches[0]
    if not matches:
        raise Trouble(f"no crash {plain(given)!r} {where}", "crashbus ls shows what there is")
    shown = ", ".join(matches[:_SHOWN_CANDIDATES])
    more = f" and {len(matches) - _SHOWN_CANDIDATES} more" if matches[_SHOWN_CANDIDATES:] else ""
    raise Trouble(
        f"{plain(given)!r} begins {len(matches)} crash IDs {where}: {shown}{more}",
        "give more of the ID",
    )


def newest_receipts(receipts: Iterable[Receipt]) -> dict[str, list[Receipt]]:
    """Return by file name the last receipt of each destination."""
    last = {(one.file.name, one.destination): one for one in receipts}
    by_file: dict[str, list[Receipt]] = defaultdict(list)
    for (name, _), receipt in last.items():
        by_file[name].append(receipt)
    return dict(by_file)
