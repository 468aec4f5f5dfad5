"""Core dumps over a connection: one frame for each chunk, and a last one with size and hash.

A frame is JSON, ``{"<file name>": {…}}``, with the fields below. With ``?core=ndjson`` it is a
line, and ``data`` holds the chunk as it is stored in base64. With ``?core=binary`` it stands behind
a head of 12 bytes, and the chunk itself behind it::

    CB 43 42 31 | length of the JSON | length of the chunk | JSON | chunk

Both lengths are unsigned, 32 bits, big endian. No line of JSON begins with the byte ``CB``, so
lines and binary frames may share a connection.
"""

import json
import struct
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from crashbus import layout, names
from crashbus.chunks import MAX_CHUNK_SIZE
from crashbus.errors import CrashbusError
from crashbus.fields import Count, CrashId, Encoding, FileName, Sha256, Size
from crashbus.parts import Part

MAGIC = b"\xcbCB1"
HEAD = struct.Struct(">4sII")
MAX_JSON = 64 * 1024  # bytes of a frame's JSON, without data
MAX_BODY = MAX_CHUNK_SIZE + MAX_CHUNK_SIZE // 128 + 1024  # what does not compress grows a little

Folder = Annotated[str, StringConstraints(max_length=1024)]


class BadFrame(CrashbusError):
    """What came is no frame, or not the one that was due."""


class CoreChunk(Part):
    """One chunk of a core. `data` or the bytes behind the frame are the chunk as it is stored."""

    crash_id: CrashId
    folder: Folder = Field("", description="the crash's folder, as at other destinations")
    chunk: Count = Field(description="position among the chunks, from 0")
    chunks: Count
    offset: Size = Field(description="position in the core")
    size: Size = Field(description="of this range of the core")
    encoding: Encoding
    sha256: Sha256 = Field(description="of the chunk as it is stored")
    data: str | None = None


class CoreEnd(Part):
    """All chunks of a core were sent, and this is the whole."""

    crash_id: CrashId
    folder: Folder = ""
    chunks: Count
    complete: Literal[True]
    encoding: Encoding
    size: Size
    sha256: Sha256
    truncated: bool = False


_FRAME: TypeAdapter[dict[FileName, CoreEnd | CoreChunk]] = TypeAdapter(
    dict[FileName, CoreEnd | CoreChunk]
)


@dataclass(frozen=True)
class Frame:
    """A frame and the file it belongs to.

    Attributes:
        body: the chunk as it is stored; empty at the end.
    """

    name: str
    told: CoreChunk | CoreEnd
    body: bytes

    @property
    def folder(self) -> str:
        """Where the file belongs: what was sent, if it is a crash's folder at all."""
        folder, crash_id = self.told.folder, self.told.crash_id
        is_safe = all(names.is_file_name(step) for step in folder.split("/"))
        is_ours = folder.endswith(f"-{crash_id}") and layout.is_object(f"{folder}/{self.name}")
        return folder if is_safe and is_ours else crash_id


def line(value: dict[str, Any], body: bytes) -> bytes:
    """Return the line of a frame.

    Args:
        value: ``{"<file name>": {…}}`` with the fields of a `CoreChunk` or `CoreEnd`, without data.
        body: the chunk as it is stored; empty at the end.
    """
    ((name, fields),) = value.items()
    whole = {name: {**fields, "data": b64encode(body).decode()} if body else fields}
    return _json(whole) + b"\n"


def binary(value: dict[str, Any], body: bytes) -> bytes:
    """Return a binary frame; `value` is as for `line`, `body` the chunk as it is stored."""
    text = _json(value)
    return HEAD.pack(MAGIC, len(text), len(body)) + text + body


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def lengths(head: bytes) -> tuple[int, int]:
    """Return the lengths of JSON and chunk in bytes that a binary frame's head announces.

    Args:
        head: the first `HEAD.size` bytes of the frame.

    Raises:
        BadFrame: it is none, or they are too large.
    """
    magic, text, body = HEAD.unpack(head)
    if magic != MAGIC:
        raise BadFrame("this is neither a line of JSON nor a frame")
    if not 0 < text <= MAX_JSON or body > MAX_BODY:
        raise BadFrame(f"a frame of {text} and {body} bytes is too large")
    return text, body


def read(text: bytes, body: bytes | None = None) -> Frame:
    """Read a frame.

    Args:
        text: the JSON, or a whole line.
        body: of a binary frame; None: it is in the JSON.

    Raises:
        BadFrame: it is none.
    """
    try:
        found = _FRAME.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise BadFrame(f"not a core's frame: {first['msg']}") from None
    if len(found) != 1:
        raise BadFrame("a frame is of one file")
    ((name, told),) = found.items()
    if body is None:
        body = _decoded(told)
    return Frame(name, told, body)


def _decoded(told: CoreChunk | CoreEnd) -> bytes:
    try:
        return b64decode((told.data or "") if isinstance(told, CoreChunk) else "", validate=True)
    except (NotBase64, ValueError):
        raise BadFrame("a chunk's data is not base64") from None
