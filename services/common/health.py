"""Health and metrics over HTTP: ``/healthz`` and ``/metrics``.

It runs in a thread of its own, so that it can tell when the event loop is stuck.
"""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from services.common.metrics import HEALTHY

LOOP_STUCK_AFTER = 15.0  # seconds without a beat; the loop beats every second
MOST_REQUESTS = 8  # at once: a probe, some who scrape metrics, a person
ANSWER_WITHIN = 10.0  # seconds for a whole request and its answer
FREE_WITHIN = 1.0  # seconds for a request that was hung up on to be gone


class Health:
    """What a service knows about its own ability to work.

    A service is healthy when its event loop beats and no check has a fault.
    """

    def __init__(self) -> None:
        self._faults: dict[str, str] = {}
        self._watched: dict[str, Callable[[], str | None]] = {}
        self._lock = threading.Lock()
        self._last_beat = time.monotonic()

    def beat(self) -> None:
        """Say that the event loop runs."""
        self._last_beat = time.monotonic()

    def failing(self, check: str, why: str) -> None:
        """Record that something this service needs does not work, and why."""
        with self._lock:
            self._faults[check] = why

    def working(self, check: str) -> None:
        """Record that something works (again)."""
        with self._lock:
            self._faults.pop(check, None)

    def watch(self, check: str, fault: Callable[[], str | None]) -> None:
        """Ask `fault` at every probe what does not work; None: it works.

        It is called from another thread, so it may only look.
        """
        with self._lock:
            self._watched[check] = fault

    def faults(self) -> dict[str, str]:
        """Return what does not work now: check to reason; empty when healthy."""
        with self._lock:
            faults = dict(self._faults)
            watched = dict(self._watched)
        faults |= {check: why for check, fault in watched.items() if (why := fault())}
        silence = time.monotonic() - self._last_beat
        if silence > LOOP_STUCK_AFTER:
            faults["event_loop"] = f"no beat for {silence:.0f} s"
        return faults


class _Server(ThreadingMixIn, WSGIServer):
    """Answers a few requests at once: whoever reaches the port gets no more threads than these.

    When all are taken, one is hung up on, for a probe's request takes milliseconds: the oldest that
    has not asked yet, so that who floods the port keeps out nobody who has.
    """

    daemon_threads = True
    request_queue_size = 128  # with a full one a probe tries again after seconds, listen(2)

    def __init__(self, *given: Any) -> None:
        self._free = threading.Semaphore(MOST_REQUESTS)
        self._open: dict[Any, float] = {}  # connection to when it came, oldest first
        self._asked: set[Any] = set()  # those whose request has come
        self._lock = threading.Lock()
        super().__init__(*given)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            with self._lock:
                yet_to_ask = (one for one in self._open if one not in self._asked)
                _hang_up(next(yet_to_ask, next(iter(self._open), None)))
            if not self._free.acquire(timeout=FREE_WITHIN):
                self.shutdown_request(request)
                return
        with self._lock:
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def asked(self, request: Any) -> None:
        """Note that the whole request has come."""
        with self._lock:
            if request in self._open:
                self._asked.add(request)

    def shutdown_request(self, request: Any) -> None:
        """End a connection; each ends here, however it went."""
        with self._lock:
            was_open = self._open.pop(request, None) is not None
            self._asked.discard(request)
            super().shutdown_request(request)
        if was_open:
            self._free.release()

    def service_actions(self) -> None:
        """Hang up on who takes too long; called twice a second."""
        limit = time.monotonic() - ANSWER_WITHIN
        with self._lock:
            for request, came in self._open.items():
                if came <= limit:
                    _hang_up(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of who hung up, or was hung up on: it is no fault of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _hang_up(request: socket.socket | None) -> None:
    with suppress(OSError):  # it was hung up on before
        if request is not None:
            request.shutdown(socket.SHUT_RDWR)


class _Quiet(WSGIRequestHandler):
    server: _Server

    def parse_request(self) -> bool:
        """Tell the server that the request has come."""
        is_whole = super().parse_request()
        self.server.asked(self.request)
        return is_whole

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: a probe every few seconds is no news."""


def serve(health: Health, address: str) -> Callable[[], None]:
    """Serve health and metrics until the returned function is called.

    Args:
        address: ``host:port``; port 0 takes a free one; empty: do not serve.

    Raises:
        OSError: the address cannot be used.
    """
    if not address:
        return lambda: None
    host, _, port = address.rpartition(":")
    HEALTHY.set_function(lambda: not health.faults())
    metrics = make_wsgi_app()

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/healthz":
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        faults = health.faults()
        status = "503 Service Unavailable" if faults else "200 OK"
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps({"healthy": not faults, "faults": faults}).encode()]

    server = make_server(host, int(port), app, server_class=_Server, handler_class=_Quiet)
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop
