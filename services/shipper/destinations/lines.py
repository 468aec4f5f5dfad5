"""What goes over TCP: newline-delimited JSON, one line for each small file, as AppScope sends it.

AppScope's daemon tries to read every file as JSON. If it is, the line is ``{"<name>": <value>}``,
otherwise ``{"<name>": [<lines>]}``, split at every newline, so that a final newline shows as an
empty last line. The bytes are those of Go's encoding/json: no blanks, keys sorted, and ``<``,
``>``, ``&``, U+2028 and U+2029 escaped. Two things differ on purpose, and lose nothing: numbers
keep all their digits (Go rounds them to a double), and bytes that are not UTF-8 show as ``\\xNN``
(Go makes all of them U+FFFD).

Only a file of up to `MAX_PARSED` bytes is read as JSON, which takes many times its size and holds
up all other threads meanwhile; AppScope's own have some KiB. A larger one goes as lines, which are
made as they are sent, so memory stays the same however many there are.

A core dump, which its daemon sends raw and without an end mark, goes in frames: `crashbus.frames`.
"""

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from crashbus.parts import CrashFile
from services.shipper.source import Piece

_GO_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
_GO_ESCAPES |= {"\u2028": "\\u2028", "\u2029": "\\u2029"}
_TO_ESCAPE = re.compile("[<>&\u2028\u2029]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


MAX_PARSED = 1024 * 1024  # bytes of a file that is read as JSON
_SLICE = 64 * 1024  # bytes of any other that are encoded at a time


def small_file(name: str, content: bytes) -> Iterable[bytes]:
    """Return the line for a file, newline included, in pieces; call and iterate off the loop."""
    if len(content) <= MAX_PARSED:
        try:
            return [_line({name: _value(content)})]
        except (ValueError, RecursionError):
            pass
    return _text_line(name, content)


def _value(content: bytes) -> Any:
    return json.loads(
        content.decode(), parse_constant=_no_number, parse_float=_finite, parse_int=_integer
    )


def _text_line(name: str, content: bytes, size: int = _SLICE) -> Iterator[bytes]:
    # The same as names.text, but slice by slice.
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    yield _line({name: 0}).removesuffix(b"0}\n") + b'["'
    for start in range(0, len(content), size):
        end = start + size
        text = decoder.decode(content[start:end], final=end >= len(content))
        texts = json.dumps(text.split("\n"), ensure_ascii=False, separators=(",", ":"))
        yield _as_go(texts)[2:-2].encode()  # without the list's outer brackets and quotes
    yield b'"]}\n'


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not a number in JSON, or not one that a double holds")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _integer(text: str) -> int:
    _finite(text)
    return int(text)


def core_chunk(crash_id: str, folder: str, file: CrashFile, piece: Piece) -> dict[str, Any]:
    """Return what is told of one chunk of a core dump; see `crashbus.frames`."""
    return {
        file.name: {
            "crash_id": crash_id,
            "folder": folder,
            "chunk": piece.index,
            "chunks": file.chunks,
            "offset": piece.offset,
            "size": len(piece.data),
            "encoding": file.encoding,
            "sha256": piece.sha256,
        }
    }


def core_end(crash_id: str, folder: str, file: CrashFile) -> dict[str, Any]:
    """Return what ends a core dump: all chunks were sent, and this is the whole."""
    return {
        file.name: {
            "crash_id": crash_id,
            "folder": folder,
            "chunks": file.chunks,
            "complete": True,
            "encoding": file.encoding,
            "size": file.size,
            "sha256": file.sha256,
            "truncated": file.truncated,
        }
    }


def _line(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return _LONE_SURROGATE.sub("\ufffd", _as_go(text)).encode() + b"\n"


def _as_go(text: str) -> str:
    return _TO_ESCAPE.sub(lambda found: _GO_ESCAPES[found[0]], text)
