"""A virtual machine with a kernel of its own, and this host's files, mounted read-only."""

import lzma
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.requirements import lacking, need_program, need_root

HERE = Path(__file__).parent
CLONE = HERE.parents[1]
KERNELS = CLONE / "build" / "kernels"

_QEMU = ("qemu-system-x86_64", "-nodefaults", "-no-reboot")
_BUSYBOX = CLONE / "build/busybox-static/bin/busybox"
_VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
# What the host's files and a layer over them need, in the order of insmod(8); what a kernel has
# built in is no module there.
_MODULES = (
    *("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("virtio_blk", "fuse", "virtiofs", "overlay", "unix_diag"),
)
_DISK = "64G"  # of which only what is written takes room
# Neither outlives a test that is killed, setpriv(1).
_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_START_WITHIN = 30.0  # seconds for virtiofsd to listen


@dataclass(frozen=True)
class Outcome:
    """What a command in a machine came to.

    Attributes:
        status: its exit status; None where the machine ended before it, or did not end.
        output: what it wrote.
        console: what the kernel wrote.
    """

    status: int | None
    output: str
    console: str


def kernel(release: str) -> Path:
    """Return where the kernel of a Debian release is unpacked, fetched if it is not there."""
    place = KERNELS / release
    subprocess.run([HERE / "kernel.sh", release, place], check=True)
    return place


def run(kernel: Path, command: str, memory: int, within: float) -> Outcome:
    """Boot a kernel and run a shell's command in this clone, as root and as nothing is kept.

    Args:
        memory: MiB that the machine has.
        within: seconds that all may take.
    """
    need_root()
    need_program(_QEMU[0])
    for program in (_BUSYBOX, _VIRTIOFSD):
        if not program.exists():
            lacking(f"needs {program}, run: MACHINES=yes deploy/setup.sh")
    with tempfile.TemporaryDirectory(prefix="cb-machine-") as directory:
        place = Path(directory)
        _initramfs(place, kernel, command)
        subprocess.run(["mkfs.ext4", "-q", "-F", place / "disk", _DISK], check=True)
        with _host_files(place / "files"):
            _boot(place, kernel, memory, within)
        output = (place / "output").read_text(errors="replace")
        said, found, status = output.rpartition("exit status ")
        return Outcome(
            status=int(status) if found and status.strip().isdigit() else None,
            output=said if found else output,
            console=(place / "console").read_text(errors="replace"),
        )


def _initramfs(place: Path, kernel: Path, command: str) -> None:
    root = place / "root"
    (root / "bin").mkdir(parents=True)
    (root / "modules").mkdir()
    shutil.copy(_BUSYBOX, root / "bin")
    shutil.copy(HERE / "init", root)
    (root / "clone").write_text(str(CLONE))
    (root / "command").write_text(command)
    for number, name in enumerate(_MODULES):
        for module in kernel.rglob(f"{name}.ko*"):
            content = module.read_bytes()
            packed = module.suffix == ".xz"
            target = root / "modules" / f"{number}-{name}.ko"
            target.write_bytes(lzma.decompress(content) if packed else content)
    archive = 'find . | "$0" cpio -o -H newc >../initramfs'
    subprocess.run(["sh", "-c", archive, _BUSYBOX], cwd=root, check=True, stderr=subprocess.DEVNULL)


@contextmanager
def _host_files(socket: Path) -> Iterator[None]:
    """Serve this host's files; the machine mounts them read-only."""
    command: list[str | Path] = [
        *_WITH_US,
        _VIRTIOFSD,
        f"--socket-path={socket}",
        "-o",
        "source=/,cache=always,sandbox=chroot",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + _START_WITHIN
        while not socket.exists():
            assert server.poll() is None, "virtiofsd ended"
            assert time.monotonic() < end, "virtiofsd does not listen"
            time.sleep(0.02)
        yield
    finally:
        server.kill()
        server.wait()


def _boot(place: Path, kernel: Path, memory: int, within: float) -> None:
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    options = {
        "machine": "q35",
        "accel": "kvm" if has_kvm() else "tcg",
        "cpu": "max",
        "smp": "2" if has_kvm() else "1",
        "m": f"{memory}M",
        # What virtiofsd and the machine share.
        "object": f"memory-backend-memfd,id=memory,size={memory}M,share=on",
        "numa": "node,memdev=memory",
        "chardev": f"socket,id=files,path={place / 'files'}",
        "device": "vhost-user-fs-pci,chardev=files,tag=host",
        "drive": f"file={place / 'disk'},format=raw,if=virtio,cache=unsafe",
        "kernel": str(image),
        "initrd": str(place / "initramfs"),
        # A machine that panics ends.
        "append": "console=ttyS0 panic=-1",
        "display": "none",
        "monitor": "none",
    }
    if not has_kvm():
        # Its clock goes by what it executes, so that no bound is too short on a busy host.
        options |= {"icount": "shift=0", "rtc": "clock=vm"}
    command = [part for name, value in options.items() for part in (f"-{name}", value)]
    for name in ("console", "output"):
        (place / name).touch()
        command += ["-serial", f"file:{place / name}"]
    machine = subprocess.Popen([*_WITH_US, *_QEMU, *command])
    try:
        machine.wait(within)
    except subprocess.TimeoutExpired:
        pass  # what it has said tells more
    finally:
        machine.kill()
        machine.wait()


def has_kvm() -> bool:
    """Tell whether this processor runs machines by itself; /dev/kvm alone does not say so.

    On a host that is a machine itself, the device may be there and run no kernel that was not
    made for it. Without KVM all takes some ten times as long.
    """
    flags = Path("/proc/cpuinfo").read_text().split()
    return Path("/dev/kvm").exists() and bool({"vmx", "svm"} & set(flags))
