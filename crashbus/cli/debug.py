"""``crashbus debug``: gdb on a crash's core dump."""

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from crashbus.cli import sysroot
from crashbus.cli.download import is_whole, refuse_to_overwrite
from crashbus.cli.errors import Trouble
from crashbus.cli.get import CrashIdArgument, FromUrl, download, make_directory
from crashbus.cli.lookup import Found, files_of, find
from crashbus.cli.terminal import console, plain
from crashbus.layout import Kind, parse_crash_file_name
from crashbus.parts import CrashFile

# Devices that programs need get mounts of their own, which the remount leaves as they are. The
# shell stays, as PID 1, which no key of the terminal stops; gdb itself has to stop for Ctrl-Z.
_NO_DEVICES = """
mount --rbind /dev /dev
for name in null zero random urandom tty; do mount --bind "/dev/$name" "/dev/$name"; done
mount -o remount,bind,nodev /dev
"$@"
exit
"""
# In a /proc of its own are no processes that have devices, proc_pid_root(5).
_ALONE = ("unshare", "--mount", "--pid", "--mount-proc", "--kill-child")


def debug(
    crash: CrashIdArgument,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- GDB ARGUMENTS]", help="Such as -- -batch.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Keep the core dump here.")
    ] = None,
    from_url: FromUrl = None,
) -> None:
    """Fetch a crash's core dump with its binaries and open it in gdb, on any machine."""
    gdb = shutil.which("gdb")
    if gdb is None:
        raise Trouble("gdb is not installed here", "apt-get install gdb")
    found = find(crash, from_url)
    core = _newest_core(found)
    with tempfile.TemporaryDirectory(prefix="crashbus-") as temporary:
        directory = make_directory(output) if output else Path(temporary)
        path = directory / core.name
        if not is_whole(path, core):
            refuse_to_overwrite(directory, [core])
            download(found, [core], directory)
        # Ours first: whoever gives the same setting means it.
        command = [gdb, *_binaries(found, directory), *(arguments or []), f"--core={path}"]
        raise typer.Exit(_run([*_without_devices(), *command]))


def _newest_core(found: Found) -> CrashFile:
    cores = files_of(found, [Kind.CORE.value])
    return max(cores, key=lambda file: (parse_crash_file_name(file.name) or (file.kind, 0))[1])


def _binaries(found: Found, directory: Path) -> list[str]:
    """Return what has gdb use the crash's binaries; this machine's stand in for them only where
    the crash's host told of none, and there is no container that had others.
    """
    assert found.crash.manifest is not None
    manifest = found.crash.manifest
    program = manifest.process.executable or "(unknown)"
    if not manifest.modules and manifest.process.container is None:
        return _of_this_machine(program)
    made = sysroot.build(found, directory)
    for text in made.missing:
        _warn(text)
    if made.executable is None:
        _warn(f"the executable {program} is not there: gdb shows none of its names")
    return made.gdb_arguments


def _of_this_machine(program: str) -> list[str]:
    if program.startswith("/") and Path(program).is_file():
        _warn(
            f"of which build {program} was is not known: this machine's is shown, and if that is "
            "another one, so are wrong names and lines"
        )
        return sysroot.of_this_machine(Path(program))
    _warn(f"the executable {program} is not on this host: gdb sees the core alone")
    return sysroot.of_this_machine(None)


def _without_devices() -> list[str]:
    """Return what root's command stands behind so that it can open no device.

    gdb puts what the process's own list of libraries names behind the system root, and opens it:
    `..` leads out, and to open a device may do something.
    """
    if os.geteuid() != 0:
        return []
    wrapper = [*_ALONE, "sh", "-ec", _NO_DEVICES, "sh"]
    with suppress(FileNotFoundError):
        if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode == 0:
            return wrapper
    return []  # a container may not mount, and has none of the host's devices


def _warn(text: str) -> None:
    console(stderr=True).print(plain(f"crashbus: {text}"), soft_wrap=True)


def _run(command: list[str]) -> int:
    """Run gdb, to which Ctrl-C belongs meanwhile."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # unlike SIG_IGN not inherited
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
