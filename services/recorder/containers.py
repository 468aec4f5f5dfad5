"""What a container is called: asked of its runtime, by the HTTP API that Docker and Podman have, or
by the CRI (`cri`).

It is asked while the process is held, when the container is certain to be there, but nobody waits
for the answer until the process was let go. https://docs.docker.com/reference/api/engine/
"""

import http.client
import json
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
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
Tell = Callable[[Path, Container], Container]


class Runtime:
    """Asks a container runtime; used by several threads.

    Args:
        socket: of its API, such as /run/docker.sock.
        tell: how it is asked; Docker's way if not given.
    """

    def __init__(self, socket: Path, tell: Tell | None = None) -> None:
        self._socket = socket
        self._tell = tell or _ask_docker
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
            found = self._tell(self._socket, container)
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


def _ask_docker(path: Path, container: Container) -> Container:
    told = _get(path, f"/v1.24/containers/{container.id}/json")
    config = told["Config"]
    labels = dict(config.get("Labels") or {})
    name = str(told["Name"]).removeprefix("/")
    return described(container, told["Id"], name, config["Image"], labels)


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


def described(
    container: Container, told_id: str, name: str, image: str, labels: Mapping[str, Any]
) -> Container:
    """Return the container with name, image and labels; these were written by its user.

    Raises:
        ValueError: this is told of another.
    """
    if told_id != container.id:
        raise ValueError("it answers with another container")
    return container.model_copy(
        update={
            "name": _text(name),
            "image": _text(image),
            "labels": {
                _text(key): _label(key, value) for key, value in sorted(labels.items())[:MAX_LABELS]
            },
        }
    )


def _label(name: str, value: Any) -> str:
    return redact.REDACTED if redact.is_secret(str(name)) else _text(value)


def _text(value: Any) -> str:
    readable = str(value).encode("utf-8", "backslashreplace").decode()
    return redact.text(readable)[:_MAX_TEXT]
