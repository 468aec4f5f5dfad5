"""Destinations: where crash files go, said in one URL.

======================  =================================================================
``s3://bucket/prefix``  objects in a bucket; which server is the shipper's own setting
``tcp://host:port``     newline-delimited JSON, as AppScope's daemon sends it
``tls://host:port``     the same, encrypted
``file:///path``        files below a directory
======================  =================================================================

Over ``tcp`` and ``tls`` core dumps go only where ``?core=ndjson`` (or ``true``, which is the same)
or ``?core=binary`` asks for them; see `crashbus.frames`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from crashbus.errors import CrashbusError
from crashbus.layout import SHARED, Kind

Scheme = Literal["s3", "tcp", "tls", "file"]

MAX_LENGTH = 512  # characters; the names of a crash's folder and file still go behind it

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_NO_BUCKET = re.compile(r".*(?:\.\.|\.-|-\.).*|\d+\.\d+\.\d+\.\d+")
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}")


class DestinationError(CrashbusError):
    """A URL that names no destination; the message says what would."""


@dataclass(frozen=True)
class Destination:
    """One destination.

    Attributes:
        url: the one way to write it; work items and receipts carry exactly this.
        host: of tcp and tls; otherwise empty.
        port: of tcp and tls; otherwise 0.
        bucket: of s3; otherwise empty.
        prefix: of s3, without slashes around it; may be empty.
        path: of file, absolute; otherwise empty.
        options: what stood behind ``?``.
    """

    url: str
    scheme: Scheme
    host: str = ""
    port: int = 0
    bucket: str = ""
    prefix: str = ""
    path: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def ships_together(self) -> bool:
        """Whether the small files of a crash go in one work item, over one connection."""
        return self.scheme in ("tcp", "tls")

    @property
    def wants_core(self) -> bool:
        """Whether core dumps are to be sent there."""
        return not self.ships_together or self.options.get("core") in ("true", "binary")

    @property
    def binary_core(self) -> bool:
        """Whether core dumps go there in binary frames, not in lines."""
        return self.options.get("core") == "binary"

    def wants(self, kind: Kind) -> bool:
        """Tell whether files of this kind are to be delivered there."""
        if kind is Kind.CORE:
            return self.wants_core
        return not (self.ships_together and (kind in SHARED or kind is Kind.MANIFEST))


def parse(url: str) -> Destination:
    """Read a destination's URL.

    Raises:
        DestinationError: with what is wrong and how it should look.
    """
    text = url.strip()
    scheme, _, rest = text.partition("://")
    if not text.isprintable() or " " in text or len(text) > MAX_LENGTH:
        raise DestinationError(
            f"destination {scheme[:8]!r}://…: "
            f"blank, unprintable or more than {MAX_LENGTH} characters"
        )
    # First of all, so that no other error shows a password. A stream's URL has no path.
    if "@" in (rest if scheme in ("tcp", "tls") else rest.partition("/")[0]):
        raise DestinationError(
            f"destination {scheme}://…: user name and password do not belong in the URL, "
            "give them as settings"
        )
    try:
        parts = urlsplit(text)
        port = parts.port or 0
    except ValueError:  # it shows what it took for a port
        mend = "this is no host and port, such as tcp://collector.example:10060"
        raise _wrong(text, mend) from None
    if parts.fragment:
        raise _wrong(text, "'#' has no meaning here, remove it and what follows")
    match parts.scheme:
        case "s3":
            return _s3(text, parts)
        case "tcp" | "tls":
            return _stream(text, parts, port)
        case "file":
            return _file(text, parts)
        case _:
            raise _wrong(text, "begin it with s3://, tcp://, tls:// or file://")


def _s3(text: str, parts: SplitResult) -> Destination:
    _no_options(text, parts)
    if not parts.netloc:
        raise _wrong(text, "the bucket is missing, such as s3://crashes/prefix")
    if not _BUCKET.fullmatch(parts.netloc):
        raise _wrong(
            text,
            "a bucket has 3 to 63 of the characters a-z 0-9 . - and begins and ends with a-z0-9",
        )
    if _NO_BUCKET.fullmatch(parts.netloc):
        raise _wrong(text, "a bucket's name is no IP address, and has no '.' beside a '.' or '-'")
    prefix = "/".join(_steps(text, parts.path))
    url = f"s3://{parts.netloc}" + (f"/{prefix}" if prefix else "")
    return Destination(url, "s3", bucket=parts.netloc, prefix=prefix)


def _stream(text: str, parts: SplitResult, port: int) -> Destination:
    scheme: Scheme = "tls" if parts.scheme == "tls" else "tcp"
    host = parts.hostname or ""
    if not _is_host(host) or not port:
        raise _wrong(text, f"host and port are needed, such as {scheme}://collector.example:10060")
    if parts.path not in ("", "/"):
        raise _wrong(text, f"nothing may follow the port but ?core=true: {parts.path!r}")
    options = _options(text, parts, {"core": ("true", "false", "ndjson", "binary")})
    if options.get("core") == "ndjson":
        options = {**options, "core": "true"}
    place = f"[{host}]" if ":" in host else host
    core = options.get("core")
    query = f"?core={core}" if core in ("true", "binary") else ""
    return Destination(
        f"{scheme}://{place}:{port}{query}", scheme, host=host, port=port, options=options
    )


def _is_host(host: str) -> bool:
    """Tell whether it is an address or a name whose parts have a length, RFC 1035, 2.3.4."""
    parts = host.removesuffix(".").split(".")
    return bool(_HOST.fullmatch(host)) and (":" in host or all(0 < len(p) < 64 for p in parts))


def _file(text: str, parts: SplitResult) -> Destination:
    _no_options(text, parts)
    if parts.netloc not in ("", "localhost"):
        raise _wrong(text, f"three slashes before an absolute path, such as file:///{parts.netloc}")
    steps = _steps(text, unquote(parts.path))
    if not steps:
        raise _wrong(text, "the directory is missing, such as file:///var/crash/delivered")
    path = "/" + "/".join(steps)
    return Destination(f"file://{quote(path)}", "file", path=path)


def _steps(text: str, path: str) -> list[str]:
    steps = [step for step in path.split("/") if step]
    if not path.isprintable() or any(step in (".", "..") for step in steps):
        raise _wrong(text, "'.', '..' and unprintable characters are not allowed in the path")
    return steps


def _no_options(text: str, parts: SplitResult) -> None:
    _options(text, parts, {})


def _options(
    text: str, parts: SplitResult, known: Mapping[str, tuple[str, ...]]
) -> Mapping[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            raise _wrong(text, f"there is no option {name!r} for {parts.scheme}://, remove it")
        if value not in known[name]:
            raise _wrong(text, f"{name} must be {' or '.join(known[name])}, not {value!r}")
        options[name] = value
    return options


def _wrong(text: str, mend: str) -> DestinationError:
    return DestinationError(f"destination {text!r}: {mend}")
