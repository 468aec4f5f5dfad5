"""A directory that bcc takes for the kernel's sources, so that none are needed on the host.

bcc looks for ``include/linux/kconfig.h`` under BCC_KERNEL_SOURCE and compiles with
``-Iinclude -Iinclude/uapi``. Ours comes from ``bpf/include``, the user-space API of the kernel
from the distribution (Debian: linux-libc-dev).
"""

import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BPF = Path(__file__).parents[2] / "bpf"
_SYSTEM = Path("/usr/include")


def system_headers() -> tuple[Path, Path] | None:
    """Return the directories of ``linux/*.h`` and ``asm/*.h``; None when not installed."""
    machine = sysconfig.get_config_var("MULTIARCH") or ""
    for asm in (_SYSTEM / machine / "asm", _SYSTEM / "asm"):
        if (asm / "types.h").exists() and (_SYSTEM / "linux/types.h").exists():
            return _SYSTEM / "linux", asm
    return None


@contextmanager
def kernel_source() -> Iterator[Path]:
    """Make the directory, readable by us alone, and remove it afterwards.

    Raises:
        FileNotFoundError: the system's headers are not installed.
    """
    system = system_headers()
    if system is None:
        raise FileNotFoundError(f"{_SYSTEM}/linux/types.h")
    with tempfile.TemporaryDirectory(prefix="crashbus-bpf-") as place:
        include = Path(place) / "include"
        (include / "uapi").mkdir(parents=True)
        _join(include / "linux", BPF / "include/linux")
        _join(include / "asm", BPF / "include/asm", system[1])
        _join(include / "uapi/linux", BPF / "include/uapi/linux", system[0])
        (include / "asm-generic").symlink_to(_SYSTEM / "asm-generic")
        yield Path(place)


def _join(directory: Path, *sources: Path) -> None:
    """Link the entries of all sources into one new directory; an earlier source goes first."""
    directory.mkdir()
    for source in sources:
        for entry in source.iterdir():
            link = directory / entry.name
            if not link.is_symlink():
                link.symlink_to(entry)
