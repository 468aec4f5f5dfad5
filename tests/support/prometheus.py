"""A real Prometheus that scrapes services of a test."""

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.nats import free_port
from tests.support.requirements import need_program

DEPLOY = Path(__file__).parents[2] / "deploy"


class Prometheus:
    """Asks a Prometheus that runs.

    Args:
        address: host:port.
    """

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}/api/v1"

    def ask(self, path: str, **query: str) -> Any:
        """Return what it says.

        Raises:
            OSError: it does not answer, or not so.
        """
        url = f"{self._url}/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def value(self, query: str) -> float | None:
        """Return the value of the first series that a query finds; None: there is none."""
        found = self.ask("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else None

    def up(self) -> set[str]:
        """Return the services whose metrics it has."""
        try:
            found = self.ask("query", query="up == 1")["result"]
        except OSError:
            return set()
        return {one["metric"]["service"] for one in found}


@contextmanager
def prometheus(directory: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """Run one with the rules of deploy/prometheus/.

    Args:
        targets: address of each service.
    """
    need_program("prometheus")
    static = [
        {"targets": [address], "labels": {"service": service}}
        for service, address in targets.items()
    ]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(DEPLOY / "prometheus" / "alerts.yml")],
        "scrape_configs": [{"job_name": "crashbus", "static_configs": static}],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Prometheus(f"127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait(60)
