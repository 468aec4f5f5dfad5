"""The eBPF program in the kernel: the only module that speaks to bcc."""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crashbus import signals as names
from crashbus.errors import CrashbusError
from services.detector import offsets
from services.detector.btf import Btf
from services.detector.headers import BPF, kernel_source

BTF_FILE = Path("/sys/kernel/btf/vmlinux")
# (process, signal) pairs the kernel remembers; the longest unseen goes. Each CPU sets 128 aside.
HANDLED_MAX = 8192

_TRACEPOINTS = {b"signal_deliver": b"on_signal", b"mark_victim": b"on_oom_victim"}
_IF_ENDING = {b"signal_generate": b"on_generate"}  # only compiled in for SIGINT and the like
_TOTAL_LOST, _TOTAL_COUNTED = 0, 1


class ProgramError(CrashbusError):
    """The eBPF program cannot be loaded or attached."""


@dataclass(frozen=True)
class HandledKey:
    """One process and signal; `start_boottime` in ns as the kernel keeps it."""

    pid: int
    start_boottime: int
    signal: int


class Program:
    """Loaded by making it, attached by `attach`; its events go to `on_record` as bytes.

    Args:
        signals: numbers of the signals to watch.
        quiet: seconds without a handled signal, after which the next is an event again.
        ring_pages: size of the ring buffer in pages, a power of two.
        on_record: called in the thread that polls; must be quick.

    Raises:
        ProgramError: the kernel or bcc refuses it; the message says what is lacking.
        BtfError: this kernel cannot be read, see `offsets.definitions`.
    """

    def __init__(
        self,
        signals: frozenset[int],
        quiet: float,
        ring_pages: int,
        on_record: Callable[[bytes], None],
    ) -> None:
        values = offsets.definitions(Btf(BTF_FILE.read_bytes())) | {
            "SIGNALS": sum(1 << (number - 1) for number in signals),
            "QUIET_NS": int(quiet * 1e9),
            "RING_PAGES": ring_pages,
            "HANDLED_MAX": HANDLED_MAX,
        }
        self._bpf = _compile(values)
        core = frozenset(names.number(one) for one in names.CRASH_SIGNALS)
        self._tracepoints = _TRACEPOINTS | (_IF_ENDING if signals - core else {})

        def on_event(_context: Any, data: int, size: int) -> None:
            on_record(ctypes.string_at(data, size))

        self._on_event = on_event  # the library keeps only a pointer to it
        self._bpf[b"events"].open_ring_buffer(on_event)

    def attach(self) -> None:
        """Start to see signals.

        Raises:
            ProgramError: the verifier or the tracepoint refuses it.
        """
        for tracepoint, function in self._tracepoints.items():
            try:
                self._bpf.attach_raw_tracepoint(tp=tracepoint, fn_name=function)
            except Exception as error:  # bcc raises no other type
                raise ProgramError(f"cannot attach to {tracepoint.decode()}: {error}") from error

    def detach(self) -> None:
        """See no more; what is in the ring buffer stays there for `drain`."""
        for tracepoint in list(self._bpf.raw_tracepoint_fds):
            self._bpf.detach_raw_tracepoint(tp=tracepoint)

    def poll(self, milliseconds: int) -> None:
        """Wait for events and hand them on, for some time at most."""
        self._bpf.ring_buffer_poll(milliseconds)

    def drain(self) -> None:
        """Hand on what is in the ring buffer now."""
        self._bpf.ring_buffer_consume()

    def lost(self) -> int:
        """Return how many events found no room in the ring buffer so far."""
        return self._total(_TOTAL_LOST)

    def counted(self) -> int:
        """Return how many handled signals were only counted so far."""
        return self._total(_TOTAL_COUNTED)

    def handled(self) -> dict[HandledKey, int]:
        """Return how many handled signals of each process were only counted so far."""
        return {
            HandledKey(key.pid, key.start_boottime, key.signal): state.count
            for key, state in self._bpf[b"handled"].items()
        }

    def close(self) -> None:
        """Detach and unload."""
        self._bpf.cleanup()

    def _total(self, index: int) -> int:
        table = self._bpf[b"totals"]
        return int(sum(table[table.Key(index)]))


def _compile(values: dict[str, int]) -> Any:
    from bcc import BPF as Module  # noqa: N811 - absent where Debian's python3-bpfcc is

    source = (BPF / "detector.bpf.c").read_bytes()
    flags = [f"-D{name}={value:#x}ULL" for name, value in values.items()]
    with kernel_source() as directory:
        os.environ["BCC_KERNEL_SOURCE"] = str(directory)
        try:
            return Module(text=source, cflags=flags)
        except Exception as error:  # bcc raises no other type
            raise ProgramError(f"cannot load the eBPF program: {error}") from error
        finally:
            del os.environ["BCC_KERNEL_SOURCE"]
