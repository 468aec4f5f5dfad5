"""What a container is called: asked of its runtime, by the HTTP API that Docker and Podman have.

It is asked while the process is held, when the container is certain to be there, but nobody waits
for the answer until the process was let go. https://docs.docker.com/reference/api/engine/
"""

import http.client
import json
import socket
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import structlog

from crashbus.parts import MAX_LABELS, Container
from services.common import redact
from services.recorder import metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()

ANSWER_WITHIN = 2.0  # seconds
_MAX_ANSWER = 4 * 1024 * 1024  # bytes
_REMEMBERED = 1024  # containers
_FRESH_FOR = 60.0  # seconds; a container can be renamed
_SILENT_FOR = 10.0  # seconds without a question after one that was not answered
_ASKED_AT_ONCE = 4
_MAX_TEXT = 1024  # characters of a name, an image, a label

Answer = Future[Container]


class Runtime:
    """Asks a container runtime; used by several threads.

    Args:
        socket: of its API, such as /run/docker.sock.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._lock = threading.Lock()
        self._silent_until = 0.0
        self._known: OrderedDict[str, tuple[float, Answer]] = OrderedDict()
        self._threads = ThreadPoolExecutor(_ASKED_AT_ONCE, "runtime")

    def ask(self, container: Container) -> Answer:
        """Return what will be the container with all that is known of it: see `answered`."""
        now = time.monotonic()
        with self._lock:
            if now < self._silent_until:
                return _no_answer()
            asked, answer = self._known.get(container.id, (0.0, None))
            if answer is not None and now - asked < _FRESH_FOR and not _failed(answer):
                return answer
            answer = self._threads.submit(self._ask, container)
            self._known[container.id] = (now, answer)
            self._known.move_to_end(container.id)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            return answer

    def _ask(self, container: Container) -> Container:
        try:
            told = _get(self._socket, f"/v1.24/containers/{container.id}/json")
            found = _described(container, told)
        except Exception as error:
            if isinstance(error, OSError):  # it hangs or is away: others' crashes need not wait
                self._silent_until = time.monotonic() + _SILENT_FOR
            metrics.RUNTIME_ANSWERS.labels("failed").inc()
            log.warning(
                "the container runtime does not say what a container is called",
                container=container.id,
                socket=str(self._socket),
                error=str(error) or type(error).__name__,
            )
            raise
        metrics.RUNTIME_ANSWERS.labels("answered").inc()
        return found


def _no_answer() -> Answer:
    answer = Answer()
    answer.set_exception(TimeoutError("the container runtime did not answer a moment ago"))
    return answer


def answered(answer: Answer | None, within: float = ANSWER_WITHIN) -> Container | None:
    """Wait for an answer; None if it does not come or was none."""
    if answer is None or not wait([answer], within).done or answer.exception() is not None:
        return None
    return answer.result()


def _failed(answer: Answer) -> bool:
    return answer.done() and answer.exception() is not None


class _Connection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_WITHIN)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_WITHIN)
        self.sock.connect(str(self._path))


def _get(path: Path, place: str) -> Any:
    connection = _Connection(path)
    try:
        connection.request("GET", place)
        response = connection.getresponse()
        body = response.read(_MAX_ANSWER)
        if response.status != http.client.OK:
            text = body[:200].decode("utf-8", "backslashreplace")
            raise ValueError(f"it answers {response.status}: {text}")
        return json.loads(body)
    finally:
        connection.close()


def _described(container: Container, told: Any) -> Container:
    """Return the container with name, image and labels; these were written by its user."""
    if told["Id"] != container.id:
        raise ValueError("it answers with another container")
    config = told["Config"]
    labels = sorted((config.get("Labels") or {}).items())[:MAX_LABELS]
    return container.model_copy(
        update={
            "name": _text(told["Name"]).removeprefix("/"),
            "image": _text(config["Image"]),
            "labels": {_text(name): _label(name, value) for name, value in labels},
        }
    )


def _label(name: str, value: Any) -> str:
    return redact.REDACTED if redact.is_secret(str(name)) else _text(value)


def _text(value: Any) -> str:
    return redact.text(str(value)[:_MAX_TEXT])
