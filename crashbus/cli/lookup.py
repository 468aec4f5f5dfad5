"""From the beginning of a crash ID to the crash, and to where its files can be read."""

from dataclasses import dataclass

from crashbus.cli import store
from crashbus.cli.bus import stored_crash
from crashbus.cli.crashes import Crash, choose
from crashbus.cli.errors import Trouble
from crashbus.layout import SHARED, binary_folder
from crashbus.parts import CrashFile


@dataclass(frozen=True)
class Copy:
    """One place at which a crash's files lie."""

    source: store.Store
    folder: str

    def keys(self, file: CrashFile) -> tuple[str, ...]:
        """Return where the file may lie in the store: the usual place first."""
        shared = binary_folder(file.name) if file.kind in SHARED else None
        if shared is None:
            return (f"{self.folder}/{file.stored_name}",)
        return tuple(f"{shared}/{one.stored_name}" for one in (file, file.beside_another))


@dataclass(frozen=True)
class Found:
    """A crash and the destinations that it can be read from, in the order to try them."""

    crash: Crash
    copies: tuple[Copy, ...]


def find(given: str, from_url: str | None, *, with_events: bool = False) -> Found:
    """Find a crash on the bus, or at a destination if one is given.

    Args:
        given: a crash ID or the beginning of one.
        with_events: and the signals that it took, which the bus alone knows.

    Raises:
        Trouble: no such crash, more than one, or the bus or destination cannot be read.
    """
    return _at_destination(given, from_url) if from_url else _on_bus(given, with_events)


def _at_destination(given: str, url: str) -> Found:
    source = store.open_store(url)
    places = list(source.places())
    crash_id = choose((place.crash_id for place in places), given, f"at {url}")
    place = next(place for place in places if place.crash_id == crash_id)
    try:
        manifest = source.manifest(place)
    except store.NotThere:
        raise Trouble(
            f"crash {crash_id} is not wholly delivered to {url}: it has no manifest yet",
            "wait, or see crashbus show without --from",
        ) from None
    if manifest.crash_id != crash_id:
        raise Trouble(
            f"the manifest in {url}/{place.folder} is of crash {manifest.crash_id}",
            "somebody changed what was delivered; take another destination",
        )
    return Found(Crash(crash_id, manifest), (Copy(source, place.folder),))


def _on_bus(given: str, with_events: bool) -> Found:
    crash = stored_crash(given, with_events=with_events)
    if crash.manifest is None:
        return Found(crash, ())
    readable = [url for url in crash.manifest.destinations if store.can_read(url)]
    folder = crash.manifest.folder
    return Found(crash, tuple(Copy(store.open_store(url), folder) for url in readable))


def files_of(found: Found, names: list[str]) -> list[CrashFile]:
    """Return the files of a crash that are asked for by name or kind; without names all but the
    binaries that came with it.

    Raises:
        Trouble: there are none, or not these.
    """
    crash = found.crash
    if crash.manifest is None or not crash.manifest.files:
        raise Trouble(
            f"crash {crash.crash_id} has no files", f"crashbus show {crash.crash_id} says why"
        )
    files = crash.manifest.files
    for name in names:
        if not any(name in (file.name, file.kind) for file in files):
            known = ", ".join(file.name for file in files)
            raise Trouble(f"crash {crash.crash_id} has no file {name!r}", f"it has {known}")
    if not names:
        return [file for file in files if file.kind not in SHARED]
    return [file for file in files if file.name in names or file.kind in names]
