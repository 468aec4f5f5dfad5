"""What the detector needs of its host."""

import importlib.util
import os
import re
from pathlib import Path

from services.common.finding import Finding
from services.detector import offsets
from services.detector.btf import Btf, BtfError
from services.detector.headers import system_headers
from services.detector.program import BTF_FILE

_LEAST_KERNEL = (5, 8)  # the BPF ring buffer
_TRACEFS = Path("/sys/kernel/tracing/events")
_STATUS = Path("/proc/self/status")
_CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}  # capabilities(7)


def check() -> list[Finding]:
    """Look at everything the detector needs; takes well under a second."""
    return [_kernel(), _privilege(), _btf(), _tracefs(), _bcc(), _headers()]


def _kernel() -> Finding:
    release = os.uname().release
    found = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if found >= _LEAST_KERNEL:
        return Finding("kernel", True, release)
    return Finding("kernel", False, release, "run Linux 5.8 or newer")


def _privilege() -> Finding:
    effective = re.search(r"^CapEff:\s*(\w+)", _STATUS.read_text(), re.MULTILINE)
    mask = int(effective[1], 16) if effective else 0
    held = {name for name, bit in _CAPABILITIES.items() if mask >> bit & 1}
    if "CAP_SYS_ADMIN" in held or held >= {"CAP_BPF", "CAP_PERFMON"}:
        return Finding("privilege to load eBPF", True, ", ".join(sorted(held)))
    return Finding(
        "privilege to load eBPF",
        False,
        f"user {os.geteuid()} without CAP_BPF and CAP_PERFMON",
        "run as root, or with CAP_BPF and CAP_PERFMON (where they are not known: CAP_SYS_ADMIN)",
    )


def _btf() -> Finding:
    mend = "run a kernel built with CONFIG_DEBUG_INFO_BTF=y (every current distribution's is)"
    try:
        offsets.definitions(Btf(BTF_FILE.read_bytes()))
    except OSError as error:
        return Finding("kernel type information (BTF)", False, f"{BTF_FILE}: {error}", mend)
    except BtfError as error:
        mend = "report this kernel's version: it keeps something where we do not look"
        return Finding("kernel type information (BTF)", False, str(error), mend)
    return Finding("kernel type information (BTF)", True, str(BTF_FILE))


def _tracefs() -> Finding:
    try:
        state = "mounted" if _TRACEFS.exists() else "not mounted"
    except PermissionError:  # it is root's alone
        state = "not ours to see"
    return Finding("tracefs", True, f"{state}; raw tracepoints do without it")


def _bcc() -> Finding:
    mend = (
        "apt-get install python3-bpfcc, and make the environment with "
        "/usr/bin/python3 -m venv --system-site-packages (the package bcc on PyPI is another)"
    )
    if importlib.util.find_spec("bcc") is None:
        return Finding("bcc", False, "this Python has no module bcc", mend)
    try:
        from bcc import BPF, __version__
    except (ImportError, OSError) as error:  # PyPI's namesake, or libbpfcc is not installed
        return Finding("bcc", False, str(error), mend)
    if not hasattr(BPF, "attach_raw_tracepoint"):
        return Finding("bcc", False, f"version {__version__} is too old", mend)
    return Finding("bcc", True, f"version {__version__}")


def _headers() -> Finding:
    found = system_headers()
    if found:
        return Finding("user-space headers of the kernel", True, ", ".join(map(str, found)))
    return Finding(
        "user-space headers of the kernel",
        False,
        "/usr/include/linux/types.h is not there",
        "apt-get install linux-libc-dev",
    )
