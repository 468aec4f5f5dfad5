"""A detector of a test's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from crashbus import Message, SignalEvent
from crashbus.messages import EventsLost, SignalCount
from services.common.outbox import Outbox
from services.detector.detector import Detector
from services.detector.settings import DetectorSettings
from tests.support.wait import until

M = TypeVar("M", SignalEvent, SignalCount)

HOST = "test-host"
_KINDS: dict[str, type[Message]] = {"signal": SignalEvent, "count": SignalCount, "lost": EventsLost}


class Watch:
    """A running detector, without a bus: what it would publish is read from its outbox.

    It sees the whole machine, so every question is about one process.
    """

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.outbox = Outbox(directory / "outbox.sqlite", 100_000, 64 * 1024**2)
        self.detector = Detector(DetectorSettings(**settings), HOST, self.outbox, lambda: None)
        self.detector.start()
        self._seen: list[Message] = []

    def close(self) -> None:
        self.detector.stop(5)
        self.outbox.close()

    def all(self, kind: type[M], pid: int) -> list[M]:
        """Return what there is so far about one process."""
        return [message for message in self.seen(kind) if message.process.pid == pid]

    def seen(self, kind: type[M]) -> list[M]:
        """Return what there is so far about all."""
        waiting = self.outbox.oldest(100_000)
        self.outbox.remove(waiting)
        for one in waiting:
            self._seen.append(_KINDS[one.subject.split(".")[1]].decode(one.payload, one.subject))
        return [message for message in self._seen if isinstance(message, kind)]

    async def event(
        self, pid: int, which: Callable[[SignalEvent], bool] = lambda event: True
    ) -> SignalEvent:
        def found() -> SignalEvent | None:
            return next((one for one in self.all(SignalEvent, pid) if which(one)), None)

        event = await until(found, within=60)
        assert event is not None
        return event
