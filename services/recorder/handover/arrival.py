"""How a crash arrives: what is said between kernel, helper and us before the core comes.

The coredump socket's protocol is the kernel's include/uapi/linux/coredump.h. The kernel sends
``struct coredump_req {u32 size, u32 size_ack, u64 mask}``, larger in later versions, and wants
``struct coredump_ack {u32 size, u32 spare, u64 mask}``; a 4-byte mark answers that, 0 for good.

We ask for KERNEL, because the kernel writes a core that gdb opens for any process, and WAIT,
because the process's /proc can be read while it waits. USERSPACE (no core at all, we read the
memory ourselves) and REJECT are not used.
"""

import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from services.recorder.errors import CaptureFailed
from services.recorder.handover.hold import Hold, Stalled
from services.recorder.handover.mechanism import Mechanism

KERNEL, WAIT = 1 << 0, 1 << 3
_MARKS = ("REQACK", "MINSIZE", "MAXSIZE", "UNSUPPORTED", "CONFLICTING")

_REQUEST = struct.Struct("=IIQ")
_ACK = struct.Struct("=IIQ")
_MARK = struct.Struct("=I")
_MAX_REQUEST = 4096  # the kernel promises less than a page
_SO_PEERPIDFD = 77
# struct pidfd_info {u64 mask, cgroup; u32 pid; …} and its ioctl, include/uapi/linux/pidfd.h: as
# old as the coredump socket at least.
_PIDFD_INFO = struct.Struct("=16xI44x")
_PIDFD_GET_INFO = 0xC040FF0B

_HELPER_MESSAGE = re.compile(rb"(\d{1,10}) (\d{1,10}) (\d{1,2}) (\d{1,12})\n")
_HELPER_WITHIN = 10.0  # seconds; the helper sends at once
_NAMED_WITHIN = 1.0
_TURN = b"!"  # to a helper: its crash is taken now
_PIPE_SIZE = 1024 * 1024  # bytes; the most an unprivileged process may set, fcntl(2)


class KeptByHelper(Exception):
    """The pipe helper waited too long, and keeps its crash by itself."""


@dataclass(frozen=True)
class Arrival:
    """What the kernel said of a crash before its core.

    Attributes:
        pid: in the initial PID namespace.
        signal: 0 where it is only known from the core.
    """

    pid: int
    signal: int


def receive(
    mechanism: Mechanism, hold: Hold, greet: Callable[[Hold], None] | None = None
) -> Arrival:
    """Receive a crash: its process is held now. Go on with `confirm`.

    Args:
        greet: does the same sooner for a request that comes at once.

    Raises:
        KeptByHelper: there is nothing to do any more.
        CaptureFailed: this is no crash, or it is one that already is over.
    """
    with _broken_off():
        if mechanism is Mechanism.PIPE:
            return _from_helper(hold)
        asks = mechanism is Mechanism.SOCKET_REQUEST
        # Once: what was taken of a longer request comes before the rest of it.
        if asks and greet is not None and not hold.greeted:
            greet(hold)
        if hold.acknowledged:
            return Arrival(hold.acknowledged, 0)
        pid = _peer(hold)
        if asks:
            _answer_request(hold)
        return Arrival(pid, 0)


def mark_size(mechanism: Mechanism) -> int:
    """Return how many bytes come before the core; `confirm` sees that all are 0, which is good."""
    return _MARK.size if mechanism is Mechanism.SOCKET_REQUEST else 0


def confirm(mechanism: Mechanism, hold: Hold) -> None:
    """See that its core comes; afterwards the hold reads that from its first byte on.

    A step of its own, because the kernel takes its time to answer, in which /proc can be read.

    Raises:
        CaptureFailed: as in `receive`.
    """
    if mechanism is not Mechanism.SOCKET_REQUEST:
        return
    with _broken_off():
        mark = hold.read_exactly(_MARK.size)
    if mark != _MARK.pack(0):
        number = _MARK.unpack(mark)[0] if len(mark) == _MARK.size else -1
        name = _MARKS[number] if 0 <= number < len(_MARKS) else str(number)
        raise _not_the_kernel(f"the answer {name} to our acknowledgement")


@contextmanager
def _broken_off() -> Iterator[None]:
    try:
        yield
    except (OSError, Stalled) as error:
        raise CaptureFailed(
            "handshake_failed",
            f"the kernel broke off before its core: {error}",
            "nothing, if the process was killed while it crashed",
        ) from error


def identify(mechanism: Mechanism, hold: Hold) -> int:
    """Return the PID of a crash that will not be captured, with next to no waiting.

    Raises:
        KeptByHelper, CaptureFailed: it cannot be told.
    """
    if mechanism is Mechanism.PIPE:
        return _from_helper(hold, _NAMED_WITHIN).pid
    try:
        return _peer(hold)
    except OSError as error:
        raise _gone(f"it cannot be told who crashed: {error}") from error


def _peer(hold: Hold) -> int:
    """Return the crashing process's PID, told by the socket's pidfd, which cannot be reused."""
    kind = socket.AF_UNIX, socket.SOCK_STREAM, 0  # known, so that nobody is asked
    connection = socket.socket(*kind, fileno=hold.descriptor)
    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    finally:
        connection.detach()
    hold.belongs_to(pidfd)
    told = bytearray(_PIDFD_INFO.size)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, told)
    except OSError as error:
        outside = error.errno == errno.EREMOTE
        why = "is outside our PID namespace (run with --pid=host)" if outside else "is gone"
        raise _gone(f"the crashing process {why}") from error
    (pid,) = _PIDFD_INFO.unpack(told)
    return int(pid)


def _answer_request(hold: Hold) -> None:
    head = hold.read_exactly(_REQUEST.size)
    if len(head) < _REQUEST.size:
        raise _not_the_kernel(f"a request of {len(head)} bytes")
    size, _, mask = _REQUEST.unpack(head)
    if not _REQUEST.size <= size < _MAX_REQUEST:
        raise _not_the_kernel(f"a request that says it has {size} bytes")
    hold.read_exactly(size - _REQUEST.size)  # of a later version; we need nothing of it
    if ~mask & (KERNEL | WAIT):
        raise _not_the_kernel(f"a request without KERNEL and WAIT: {mask:#x}")
    hold.write(_ACK.pack(_ACK.size, 0, KERNEL | WAIT))


def _from_helper(hold: Hold, within: float = _HELPER_WITHIN) -> Arrival:
    # It may wait for us, `chain`; closed together with the hold.
    hold.helper = helper = socket.socket(fileno=os.dup(hold.descriptor))
    helper.settimeout(within)
    try:
        helper.send(_TURN)
    except OSError as error:
        raise KeptByHelper from error
    try:
        text, descriptors, _, _ = socket.recv_fds(helper, 256, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError as error:  # it ended with our turn unread
        raise KeptByHelper from error
    if not text:
        raise KeptByHelper
    match = _HELPER_MESSAGE.fullmatch(text)
    if not match or len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        raise _not_the_kernel(f"{len(descriptors)} descriptors and {text!r}")
    with suppress(OSError):  # a smaller pipe only costs time
        fcntl.fcntl(descriptors[0], fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    hold.continue_with(descriptors[0])
    pid, _, signal, _ = (int(part) for part in match.groups())
    with suppress(OSError):  # it was killed meanwhile, or there is no descriptor left
        hold.belongs_to(os.pidfd_open(pid))
    return Arrival(pid, signal if signal <= 64 else 0)


def _gone(error: str) -> CaptureFailed:
    return CaptureFailed(
        "process_gone", error, "nothing, if it was killed while it crashed (docker stop, OOM)"
    )


def _not_the_kernel(what: str) -> CaptureFailed:
    return CaptureFailed(
        "handshake_failed",
        f"not a crash: {what}",
        "only the kernel may connect to CRASHBUS_RECORDER_SOCKET: see who else does",
    )
