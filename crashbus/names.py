"""Safe names: what a crashed process wrote becomes a token, a file name or a line of text.

Everything here is reversible or visibly lossy; nothing lets a byte of the input act as a
separator, a wildcard or a step up the tree.
"""

import re
from urllib.parse import quote_from_bytes, unquote_to_bytes

_SAFE_NAME = re.compile(r"[A-Za-z0-9_%~-][A-Za-z0-9._%~-]{0,254}")


def token(text: str) -> str:
    """Return `text` as one NATS subject token (``.`` becomes ``%2E``); empty becomes ``_``."""
    return (
        quote_from_bytes(text.encode("utf-8", "surrogateescape"), safe="").replace(".", "%2E")
        or "_"
    )


def untoken(subject_token: str) -> str:
    """Return the text that `token` escaped."""
    return unquote_to_bytes(subject_token).decode("utf-8", "backslashreplace")


def file_name(raw: bytes) -> str:
    """Return a file's name with every byte outside ``A-Za-z0-9._~-`` percent-encoded."""
    name = quote_from_bytes(raw, safe="")
    return "%2E" + name[1:] if name.startswith(".") else name


def is_file_name(name: str) -> bool:
    """Tell whether `name` can stand alone as a path component: never hidden, ``..`` or empty."""
    return _SAFE_NAME.fullmatch(name) is not None


def printable(text: str, keep: str = "") -> str:
    """Return text that a terminal shows and does not obey.

    Control characters, escape sequences, invisible and direction-changing characters and
    lone surrogates are shown as ``\\x1b``, ``\\u202e``, ….

    Args:
        keep: characters that stay as they are, such as line feeds.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def text(raw: bytes) -> str:
    """Return bytes as text that any consumer can read: bad UTF-8 shows as ``\\xNN``."""
    return raw.decode("utf-8", "backslashreplace")
