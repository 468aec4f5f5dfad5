"""How the S3 server is named in settings."""

import re

_PLACE = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?")


def checked(given: str) -> str:
    """Return a server's URL without a slash at its end.

    Raises:
        ValueError: it is none, or holds more than scheme, host and port.
    """
    scheme, _, rest = given.partition("://")
    if scheme not in ("http", "https") or not rest.strip("/") or "/" in rest.rstrip("/"):
        raise ValueError("must be http://host[:port] or https://host[:port], without a path")
    if "@" in rest:
        raise ValueError("must not hold keys; they have settings of their own")
    if not _PLACE.fullmatch(rest.rstrip("/")):
        raise ValueError(f"{rest!r} is no host[:port]")
    return given.rstrip("/")
