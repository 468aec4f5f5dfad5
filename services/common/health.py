"""Health and metrics over HTTP: ``/healthz`` and ``/metrics``.

It runs in a thread of its own, so that it can tell when the event loop is stuck.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from services.common.metrics import HEALTHY

LOOP_STUCK_AFTER = 15.0  # seconds without a beat; the loop beats every second


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
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    timeout = 10  # seconds; a client that says nothing does not keep its thread

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
