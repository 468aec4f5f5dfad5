"""What is said between a pipe helper and us, when one of both ends."""

import select
import socket
import threading

import pytest

from services.recorder.errors import CaptureFailed
from services.recorder.handover import arrival
from services.recorder.handover.arrival import KeptByHelper
from services.recorder.handover.hold import Hold
from services.recorder.handover.mechanism import Mechanism


def ends_when_told(helper: socket.socket) -> None:
    waiting = select.poll()
    waiting.register(helper, select.POLLIN)
    waiting.poll(60_000)
    helper.close()  # with its turn unread: ECONNRESET, unix(7)


@pytest.mark.parametrize("is_reset", [True, False])
def test_helper_that_ends_when_its_turn_comes_keeps_its_crash(is_reset: bool) -> None:
    ours, helper = socket.socketpair()
    hold = Hold(ours.detach(), 20)
    ending = threading.Thread(target=ends_when_told, args=(helper,))
    if is_reset:
        ending.start()
    else:
        helper.shutdown(socket.SHUT_WR)

    with pytest.raises(KeptByHelper):
        arrival.receive(Mechanism.PIPE, hold)

    if is_reset:
        ending.join(60)
    helper.close()
    hold.close()


def test_who_is_no_helper_is_told() -> None:
    ours, other = socket.socketpair()
    hold = Hold(ours.detach(), 20)
    with other:
        other.sendall(b"hello")
        with pytest.raises(CaptureFailed, match="not a crash: 0 descriptors and b'hello'"):
            arrival.receive(Mechanism.PIPE, hold)
    hold.close()
