"""Where crash files lie and what they are called: on the host and at a destination.

On the host the layout is AppScope's: ``/tmp/appscope/<pid>/<kind>_<epoch>``, one epoch for
each set of files. At a destination a crash is a folder a human can find by host, day, time
and process name, derived from the crash alone so that a second delivery writes the same
objects: ``<host>/<YYYY-MM-DD>/<HHMMSS>-<process>-<crash ID>/``. Programs and libraries lie
there once for each build ID, or content where they have none, as debuginfod and gdb have them:
``build-id/<xx>/<rest>/{executable,debuginfo}``.
"""

import re
from datetime import UTC, datetime
from enum import StrEnum

from crashbus import names

SPOOL = "/tmp/appscope"  # noqa: S108 - AppScope's library writes here, so the place is given
MANIFEST_NAME = "manifest.json"
BINARIES = "build-id"  # directory for them, in the spool and at a destination
UNRECORDED = ".unrecorded"  # file in the spool: whose crash was read and has no record yet
CORES = ".cores"  # in the spool: where the collector takes cores that get no file here
DRAFTS = ".drafts"  # in the spool: what the next recorder needs to finish what one had in hand
ORPHANS = ".orphans"  # crashes that the pipe helper kept in the spool while there was no recorder

_CRASH_FILE = re.compile(r"(info|cfg|backtrace|snapshot|core|capture)_([0-9]{1,11})(\.json)?")
_BINARY = re.compile(r"(executable|debuginfo)_([0-9a-f]{4,128})_([0-9a-f]{16})")
_OBJECT = re.compile(
    r"[^/]+/\d{4}-\d\d-\d\d/\d{6}-[^/]+-[0-9a-hjkmnp-tv-z]{16}/[^/]+"
    rf"|{BINARIES}/[0-9a-f]{{2}}/[0-9a-f]+/[^/]+"
)
_YEAR_10000 = 253402300800  # Unix seconds; no later time can be written as a date


class Kind(StrEnum):
    """What a crash file is; declared in the order in which the files of a crash are shipped."""

    INFO = "info"
    BACKTRACE = "backtrace"
    BACKTRACE_JSON = "backtrace_json"  # the same for machines: backtrace_<epoch>.json
    SNAPSHOT = "snapshot"
    CFG = "cfg"
    CORE = "core"
    EXECUTABLE = "executable"  # a program or library that was mapped
    DEBUGINFO = "debuginfo"  # its separate debug information
    MANIFEST = "manifest"
    CAPTURE = "capture"  # the recorder's note to the collector; never shipped


SHIPPING_ORDER = (
    Kind.INFO,
    Kind.BACKTRACE,
    Kind.BACKTRACE_JSON,
    Kind.SNAPSHOT,
    Kind.CFG,
    Kind.CORE,
    Kind.EXECUTABLE,
    Kind.DEBUGINFO,
)
LARGE = frozenset({Kind.CORE, Kind.EXECUTABLE, Kind.DEBUGINFO})
# Stored once for each build ID, not with the crash.
SHARED = frozenset({Kind.EXECUTABLE, Kind.DEBUGINFO})


def crash_file_name(kind: Kind, epoch: int) -> str:
    """Return the name of one crash file, such as ``core_1795388839``."""
    if kind is Kind.BACKTRACE_JSON:
        return f"{Kind.BACKTRACE}_{epoch}.json"
    return f"{kind}_{epoch}"


def parse_crash_file_name(name: str) -> tuple[Kind, int] | None:
    """Return kind and epoch (Unix seconds) of a crash file's name; None for any other name.

    Any user may name a file in the spool: what no clock of ours can show is another name.
    """
    match = _CRASH_FILE.fullmatch(name)
    if match is None or int(match[2]) >= _YEAR_10000:
        return None
    kind = Kind(match[1])
    if match[3]:
        return (Kind.BACKTRACE_JSON, int(match[2])) if kind is Kind.BACKTRACE else None
    return kind, int(match[2])


def is_large(name: str) -> bool:
    """Tell by its name whether a file is a core or a binary, for which small files do not wait."""
    parsed = parse_crash_file_name(name)
    return parsed[0] in LARGE if parsed else _BINARY.fullmatch(name) is not None


def binary_name(kind: Kind, build_id: str, sha256: str) -> str:
    """Return the name of a binary in the spool: of one build there may be several contents,
    such as with and without symbols.
    """
    return f"{kind}_{build_id}_{sha256[:16]}"


def stand_in_build_id(sha256: str) -> str:
    """Return what stands for the build ID of a file that has none."""
    return sha256[:40]  # as many digits as linkers write


def binary_folder(name: str) -> str | None:
    """Return the folder at a destination of a file with a binary's name; None for any other."""
    match = _BINARY.fullmatch(name)
    return match and _build_folder(match[2])


def binary_key(kind: Kind, build_id: str) -> str:
    """Return where a destination has a build's file of a kind."""
    return f"{_build_folder(build_id)}/{kind}"


def _build_folder(build_id: str) -> str:
    return f"{BINARIES}/{build_id[:2]}/{build_id[2:]}"


def folder(host: str, crashed_at: float, process_name: str, crash_id: str) -> str:
    """Return a crash's folder below a destination's prefix, such as
    ``web1/2026-11-23/001512-nginx-0c2vx9t7q4m8k3ae``.

    Args:
        crashed_at: Unix seconds; the folder is named in UTC, whatever the host's zone.
    """
    at = datetime.fromtimestamp(crashed_at, UTC)
    process = names.file_name(process_name.encode())[:64] or "unknown"
    place = names.file_name(host.encode())
    return f"{place}/{at:%Y-%m-%d}/{at:%H%M%S}-{process}-{crash_id}"


def is_object(key: str) -> bool:
    """Tell whether a key below a destination's prefix is one that a crash file gets."""
    return _OBJECT.fullmatch(key) is not None
