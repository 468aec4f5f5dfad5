"""How the S3 server is named in settings."""


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
    return given.rstrip("/")
