"""What every kind of destination can do."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from crashbus.destination import Destination
from crashbus.parts import CrashFile
from services.shipper.source import Source


class Deliverer(ABC):
    """Delivers to one destination; used for several items at a time.

    Whatever a deliverer began and did not finish, it takes back: on a failure, on a damaged
    source, and when it is cancelled. What another try can go on with may stay until there is
    none any more. The cause of a failure is never hidden by that.

    Attributes:
        shows_repeats: what is delivered twice is there twice.
    """

    shows_repeats = False

    def __init__(self, destination: Destination) -> None:
        self.destination = destination

    @abstractmethod
    async def check(self) -> None:
        """See whether the destination could take files now; make it ready where that is allowed.

        Raises:
            Failure: it could not.
        """

    @abstractmethod
    async def deliver(self, folder: str, sources: Sequence[Source]) -> None:
        """Deliver files of one crash and verify that they lie there whole.

        Delivering again writes the same again.

        Args:
            folder: the crash's folder below the destination, see `crashbus.layout.folder`.

        Raises:
            Passing, Final: nothing can be said of any of the files.
            Unfit: one file cannot be delivered; nothing can be said of the others.
            BusUnreachable: the source did not answer.
        """

    async def give_up(self, folder: str, file: CrashFile) -> None:  # noqa: B027 - most leave nothing
        """Take back what tries of a file that is given up left for further tries."""

    async def tidy(self) -> None:  # noqa: B027 - most leave nothing
        """Remove what shippers that are no more left behind; called from time to time.

        Raises:
            Failure: it cannot be done now.
        """

    async def sha256_of(self, folder: str, name: str) -> str | None:
        """Return what lies under a name: its SHA-256, empty where that is not known; None for
        nothing. Asked of what several crashes share.

        Raises:
            Failure: it cannot be told.
        """
        return None

    @abstractmethod
    def url_of(self, folder: str, file: CrashFile) -> str:
        """Return where a delivered file lies."""
