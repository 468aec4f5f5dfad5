"""Files of settings as systemd reads them for EnvironmentFile=, systemd.exec(5).

What the manual does not say is as in its src/basic/env-file.c: a quote counts only where a value
begins, or right behind another quoted part, and what is quoted may have many lines.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_QUOTED = r"""'([^']*)('|\Z)|"((?:\\.|[^"\\])*)\\?("|\Z)"""
_BARE = r"""(?!['"])(?:\\.|[^\\ \t\n\r]|[ \t]+(?=[^ \t\n\r]))*"""
_COMMENT = r"""[#;](?:\\.|[^\\\n\r])*"""  # until systemd 254 a backslash continued it, too
_SETTING = rf"([^\n\r][^=\n\r]*)=[ \t]*((?:(?:{_QUOTED})[ \t]*)*)({_BARE})"
_ENTRY = re.compile(rf"[ \t\n\r]*(?:{_COMMENT}|{_SETTING}|[^\n\r]*)\\?", re.DOTALL)
_PARTS = re.compile(_QUOTED, re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True)
class Setting:
    """One of a file.

    Attributes:
        is_closed: False where a quote has no end and took the rest of the file.
    """

    name: str
    value: str
    is_closed: bool


def read(text: str) -> Iterator[Setting]:
    """Yield the settings of a file, in order."""
    for entry in _ENTRY.finditer(text):
        name, quoted, bare = entry[1], entry[2], entry[7]
        if name is not None:
            parts = [*_PARTS.finditer(quoted)]
            value = "".join(map(_unquoted, parts)) + _ESCAPED.sub(_literal, bare)
            yield Setting(name.strip(" \t"), value, all(one[2] or one[4] for one in parts))


def _unquoted(part: re.Match[str]) -> str:
    if part[1] is not None:
        return part[1]
    return _ESCAPED.sub(_as_in_a_shell, part[3])


def _literal(escaped: re.Match[str]) -> str:
    return "" if escaped[1] in "\n\r" else escaped[1]


def _as_in_a_shell(escaped: re.Match[str]) -> str:
    """In double quotes a backslash stays before what needs none."""
    if escaped[1] == "\n":
        return ""
    return escaped[1] if escaped[1] in '"\\`$' else escaped[0]
