"""Debug information from debuginfod servers and buckets, fetched once for each build ID.

What a server sends is parsed by C libraries later on, and the way to it is the network's, so a
process without rights fetches it, `debuginfod_worker`, into files that are opened for it. Here it
is looked at: a file of another build is thrown away.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import structlog
from pydantic import ValidationError

from services.recorder import metrics
from services.recorder.unwinding import debug_files
from services.recorder.unwinding.debug_sources import Sources
from services.recorder.unwinding.debuginfod_worker import Fetched, Order, Wanted
from services.recorder.unwinding.unwind_process import receive, send

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_COMMAND = (sys.executable, "-I", "-m", "services.recorder.unwinding.debuginfod_worker")
_ASK_AGAIN = 3600.0  # seconds until a server is asked again for what it did not have
_REMEMBERED = 10_000  # build IDs that no server has
_KILLED_WITHIN = 2.0  # seconds from SIGKILL to its end
_MAX_ANSWER = 1024 * 1024  # bytes; a thousand build IDs take about 100 KB
_AT_LEAST = 0.5  # seconds; less is not worth a process
_UNFINISHED = ".download-"  # how names of files begin that have not come whole
# Of our environment: how to get out of this network, and whom to trust there.
_PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "HTTPS_PROXY", "NO_PROXY")
_TRUST = ("SSL_CERT_FILE", "SSL_CERT_DIR")


class Debuginfod:
    """Fetches into a directory of the form that gdb and drgn know; used by several threads.

    Args:
        sources: who is asked.
        cache: the directory; its files are readable for everyone.
        within: seconds for all files of one crash.
        max_bytes: of one file.
        cache_bytes: of all of them; those used longest ago are removed.
    """

    def __init__(
        self, sources: Sources, cache: Path, within: float, max_bytes: int, cache_bytes: int
    ) -> None:
        self._sources = sources
        self._cache = cache
        self._within = within
        self._max_bytes = max_bytes
        self._cache_bytes = cache_bytes
        self._missing: dict[str, float] = {}  # build ID to when it was asked for, monotonic

    def remove_unfinished(self) -> None:
        """Remove what a recorder that was killed had begun to fetch: no limit counts it.

        Only for this host's recorder, before it fetches: a snapshot uses the same directory.
        """
        for path in self._cache.glob(f"{_UNFINISHED}*"):
            with suppress(OSError):
                path.unlink()

    def fetch(self, build_ids: Iterable[str], within: float) -> None:
        """See to it that what the servers have is in the cache; what goes wrong is logged.

        Args:
            within: seconds that there are.
        """
        if not self._sources:
            return
        end = time.monotonic() + min(within, self._within)
        wanted = tuple(dict.fromkeys(build_ids))
        self._fetch_new(wanted, end)
        self._fetch_new(self._supplements(wanted), end)

    def _fetch_new(self, build_ids: Iterable[str], end: float) -> None:
        new = [one for one in dict.fromkeys(build_ids) if self._is_new(one)]
        within = end - time.monotonic()
        if not new or within < _AT_LEAST:
            return
        try:
            self._fetch(new, within)
            self._prune()
        except Exception as error:  # noqa: BLE001 - it costs names, and must not cost the crash
            metrics.DEBUGINFO.labels("failed").inc(len(new))
            log.warning("no debug information is fetched", error=repr(error))

    def _supplements(self, build_ids: Iterable[str]) -> Iterator[str]:
        """Give the build IDs of what the files in the cache refer to."""
        for build_id in build_ids:
            with debug_files.opened([self._cache], build_id) as file:
                link = debug_files.link_of(file) if file >= 0 else None
            if link is not None:
                yield link.build_id

    def _is_new(self, build_id: str) -> bool:
        asked = self._missing.get(build_id)
        if asked is not None and time.monotonic() - asked < _ASK_AGAIN:
            return False
        try:
            os.utime(self._place(build_id))  # used now
        except FileNotFoundError:
            return True
        except OSError:
            pass  # on a disk that is read only: it is there all the same
        return False

    def _place(self, build_id: str) -> Path:
        return debug_files.path_of(self._cache, build_id)

    def _fetch(self, build_ids: list[str], within: float) -> None:
        hidden: dict[str, tuple[Path, int]] = {}
        _make_directory(self._cache)
        try:
            for one in build_ids:
                path = self._cache / f"{_UNFINISHED}{secrets.token_hex(8)}"
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                hidden[one] = path, os.open(path, flags, 0o644)
            order = Order(
                wanted=tuple(
                    Wanted(build_id=one, file=file, urls=self._sources.urls(one))
                    for one, (_, file) in hidden.items()
                ),
                max_bytes=self._max_bytes,
                seconds=within,
            )
            self._keep(_run(order), hidden)
        finally:
            for path, file in hidden.values():
                os.close(file)
                path.unlink(missing_ok=True)

    def _keep(self, fetched: Fetched, hidden: dict[str, tuple[Path, int]]) -> None:
        """Give its name to what came whole and is of the right build."""
        for build_id in fetched.whole:
            path, file = hidden.get(build_id, (Path(), -1))
            if file < 0 or debug_files.build_id_of(file) != build_id:
                log.warning("debug information of another build came", build_id=build_id)
                metrics.DEBUGINFO.labels("refused").inc()
                self._remember(build_id)
                continue
            place = self._place(build_id)
            _make_directory(place.parent.parent)
            _make_directory(place.parent)
            os.fchmod(file, 0o644)  # the unwinder is nobody
            path.rename(place)
            metrics.DEBUGINFO.labels("fetched").inc()
        for build_id in fetched.missing:
            metrics.DEBUGINFO.labels("missing").inc()
            self._remember(build_id)
        if failed := len(hidden.keys() - set(fetched.whole) - set(fetched.missing)):
            metrics.DEBUGINFO.labels("failed").inc(failed)
            log.warning("debug information did not come", builds=failed, reasons=fetched.faults)

    def _remember(self, build_id: str) -> None:
        if len(self._missing) >= _REMEMBERED:
            self._missing.clear()
        self._missing[build_id] = time.monotonic()

    def _prune(self) -> None:
        """Remove those files that were used longest ago."""
        found = []
        for path in self._cache.glob(".build-id/*/*.debug"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._cache_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _make_directory(path: Path) -> None:
    """Make a directory that everyone can read, whatever the umask."""
    if not path.exists():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o755)


def _run(order: Order) -> Fetched:
    """Have a worker fetch; what it had not said when it was killed did not come."""
    passed = {name: os.environ[name] for name in (*_PASSED_ON, *_TRUST) if name in os.environ}
    worker = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=tuple(one.file for one in order.wanted),
        cwd="/",
        env={"LANG": "C.UTF-8", **passed},
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    end = time.monotonic() + order.seconds
    try:
        send(worker.stdin.fileno(), order.model_dump_json().encode(), end)
        worker.stdin.close()
        answer = receive(worker.stdout.fileno(), end, _MAX_ANSWER)
        if answer is not None:
            return Fetched.model_validate_json(answer)
        log.warning("debug information takes too long", seconds=order.seconds)
    except ValidationError:
        log.warning("debug information could not be fetched", status=worker.poll())
    finally:
        worker.kill()
        worker.stdin.close()
        worker.stdout.close()
        with suppress(subprocess.TimeoutExpired):
            worker.wait(_KILLED_WITHIN)
    return Fetched()
