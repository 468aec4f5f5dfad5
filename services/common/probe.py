"""A container's health check: ask the one service in it whether it can do its job.

The service is found by its setting ``CRASHBUS_<SERVICE>_HTTP``, which its image sets.
"""

import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping

ANSWER_WITHIN = 4.0  # seconds


def address(environment: Mapping[str, str]) -> str:
    """Return host and port to ask.

    Raises:
        ValueError: no setting tells them.
    """
    for name, value in environment.items():
        if re.fullmatch(r"CRASHBUS_[A-Z]+_HTTP", name) and value:
            host, _, port = value.rpartition(":")
            return f"{'127.0.0.1' if host in ('', '0.0.0.0') else host}:{port}"  # noqa: S104
    raise ValueError("no CRASHBUS_<SERVICE>_HTTP is set")


def main() -> None:
    """Exit with 0 when the service is healthy, else with 1 and its reasons."""
    try:
        url = f"http://{address(os.environ)}/healthz"
        with urllib.request.urlopen(url, timeout=ANSWER_WITHIN) as answer:
            sys.stdout.write(answer.read().decode())
    except urllib.error.HTTPError as error:
        sys.exit(error.read().decode(errors="replace"))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
