"""What is the same for every crash."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import structlog

from crashbus.identity import boot_id
from services.common.bus_settings import BusSettings
from services.common.unrecorded import Unrecorded
from services.recorder import cri
from services.recorder.binaries import Binaries
from services.recorder.containers import Runtime
from services.recorder.core.core_bus import BusWay
from services.recorder.core.core_policy import CorePolicy, Extent
from services.recorder.core.turns import Turns
from services.recorder.handover.chain import Chain
from services.recorder.handover.mechanism import Mechanism
from services.recorder.settings import RecorderSettings
from services.recorder.taker.taker_library import LIBRARY, load
from services.recorder.taker.taking import Taker
from services.recorder.unwinding.debuginfod import Debuginfod
from services.recorder.unwinding.unwind_process import Server as UnwindServer

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MODULE_FILES = 64  # opened for one crash: most programs map fewer libraries


@dataclass(frozen=True)
class Conditions:
    """What is the same for every crash.

    Attributes:
        mechanism: how crashes arrive.
        configuration: what ``cfg`` shows.
        module_files: how many descriptors one crash may keep open for its modules now.
        on_want_of_room: told how many bytes the last core wanted in vain; 0: it had them.
        turns: of large cores.
        unwind_server: has workers ready; without it each is started for itself.
        chain: gets each captured crash whose core is kept.
    """

    mechanism: Mechanism
    host: str
    boot_id: str
    spool: Path
    version: str
    max_core_bytes: int
    core_policy: CorePolicy
    coredump_filter: int | None  # kinds of memory that a core may have; None: as the process says
    runtime: Runtime | None
    only_stream: bool  # read no memory but what the kernel sends
    taker: Taker | None  # of small processes; None: none is let go that early
    disk_reserve: float  # percent
    bus_way: BusWay | None  # for cores that get no file; None: all of them do
    binaries: Binaries
    debug_directories: tuple[Path, ...]
    debuginfod: Debuginfod
    configuration: Mapping[str, Any]
    module_files: Callable[[], int]
    on_want_of_room: Callable[[int], None]
    turns: Turns
    unwind_server: UnwindServer | None = None
    chain: Chain | None = None

    @property
    def early_taker(self) -> Taker | None:
        """Of processes that are let go early; None where a former handler wants them, too."""
        return self.taker if self.chain is None else None

    @classmethod
    def of(
        cls,
        shared: BusSettings,
        settings: RecorderSettings,
        configuration: Mapping[str, Any],
        mechanism: Mechanism = Mechanism.SOCKET,
        module_files: Callable[[], int] = lambda: MODULE_FILES,
        on_want_of_room: Callable[[int], None] = lambda _: None,
        turns: Turns | None = None,
    ) -> Self:
        """Return what the settings say."""
        return cls(
            mechanism=mechanism,
            host=shared.host,
            boot_id=boot_id(),
            spool=shared.spool,
            version=version("crashbus"),
            max_core_bytes=settings.max_core_bytes,
            core_policy=CorePolicy(
                Extent.STACKS if settings.core == "stacks" else Extent.ALL,
                settings.core_off_rules,
                settings.loop_burst,
                settings.loop_one_in,
            ),
            coredump_filter=settings.coredump_filter_mask,
            runtime=_runtime(settings),
            only_stream=settings.core_source == "stream",
            taker=_taker(shared.spool, settings),
            disk_reserve=settings.disk_reserve,
            bus_way=_bus_way(shared.spool, settings),
            binaries=Binaries(
                shared.spool,
                settings.max_binary_bytes,
                settings.disk_reserve,
                settings.debug_directories,
            ),
            debug_directories=settings.debug_directories,
            debuginfod=Debuginfod(
                settings.debug_sources,
                settings.debuginfod_cache,
                settings.debuginfod_deadline,
                settings.max_binary_bytes,
                settings.debuginfod_cache_bytes,
            ),
            configuration=configuration,
            module_files=module_files,
            on_want_of_room=on_want_of_room,
            turns=turns or Turns(settings.captures, 0, 0),
        )


def _taker(spool: Path, settings: RecorderSettings) -> Taker | None:
    if settings.core_source == "stream" or settings.coredump_filter:
        return None  # of what is let go early it cannot be told which kind of memory is what
    library = settings.helper.with_name(LIBRARY)
    try:
        taking = load(library)
    except OSError as error:
        log.warning("small processes are held longer: build with make setup", error=str(error))
        return None
    asks_runtime = (settings.runtime_socket or settings.cri_socket) is not None
    return Taker(taking, Unrecorded(spool), settings.max_core_bytes, labels_needed=asks_runtime)


def _runtime(settings: RecorderSettings) -> Runtime | None:
    if settings.cri_socket is not None:
        return Runtime(settings.cri_socket, cri.tell)
    return Runtime(settings.runtime_socket) if settings.runtime_socket else None


def _bus_way(spool: Path, settings: RecorderSettings) -> BusWay | None:
    if settings.core_to == "disk" or settings.core_source == "stream":
        return None
    return BusWay(
        spool,
        settings.core_to_patience,
        settings.hold_deadline,
        always=settings.core_to == "bus",
    )
