"""Values that have a name, in the middle of text: where they begin and where they end.

``password=x``, ``password = x``, ``Password: x``, ``--password x``, ``"password": "x"`` and the
like, in a shell's command, a header, YAML, or JSON that is a string in JSON. Text is hostile: each
pattern is tried where the last match ended, and what it begins to match is bounded, or never given
back, so that nothing is gone over again and again. (Groups are not possessive: Python 3.11.2 then
goes on behind what a failed repetition had matched.)
"""

import re
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import NamedTuple

# What follows a name tells how its value ends: the last named group is the form.
_NAME = re.compile(
    r"(?<![\w.-])(?:"
    r"(?P<option>--?[A-Za-z][\w.-]{0,63}+)[ \t]{1,4}+(?![\s=:-])"
    r"|(?P<name>[\w.-]{1,64}+)(?:"
    r"(?P<quoted>\\{0,7}[\"']\s{0,4}(?::|=>?)\s{0,4})"
    r"|(?P<spaced>[ \t]{1,4}(?:={1,3}>?[ \t]{0,4}|:=?[ \t]{1,4}))"
    r"|(?P<line>:[ \t]{1,4})"
    r"|(?P<word>(?:\]|%5[Dd])?=)"  # also user[password]=x, in a form that was sent
    r"|(?P<colon>:(?![\s:/]))"
    r"))"
)
# A comma may be part of the value, unless another name, or nothing, comes behind it.
_WORD = r"""(?:[^\s&;,"']++|,(?![\s"']|\Z|[\w.-]{1,64}=))+"""
_BLOCK = r"[|>][-+\d]{0,2}[ \t]*+(?:(?:\r?\n)+[ \t][^\r\n]*+)*"  # a block scalar, YAML 1.2, 8.1
_STRING = r"""(?:"(?:[^"\\]++|\\.)*"?|'(?:[^'\\]++|\\.)*'?)"""
_VALUES = {
    form: re.compile(pattern, re.DOTALL)
    for form, pattern in {
        "option": r"[^\s\"']+",
        "quoted": rf"\[(?:{_STRING}|\\.|[^\]\"'\\]++)*\]?|[^\s\[{{,}}\]\\\"'][^\r\n,}}\]\\\"']*",
        "spaced": r"(?:[^\s;,\"']++|(?![ \t,]{1,4}[\w.-]{1,64}[ \t]{0,4}=)[ \t,])+",
        "line": rf"{_BLOCK}(?=\r?\n|\Z)|[^\r\n\"']+",
        "word": _WORD,
        "colon": _WORD,
    }.items()
}
_OPENING = re.compile(r"\$?(\\*+)([\"'])")  # $'x' is a string of the shell's, bash(1)
_CLOSING = {quote: re.compile(rf"(?<!\\)(\\*+){quote}") for quote in "\"'"}


class How(Enum):
    """How a name and its value are joined.

    Attributes:
        VAGUE: as those of no secret often are: host:port, image:tag, and running text: like this.
    """

    PLAIN = auto()
    QUOTED = auto()
    VAGUE = auto()


class Value(NamedTuple):
    """Where a value lies in its text, without quotes around it; `end` is behind these."""

    start: int
    stop: int
    end: int


def found(text: str, is_secret: Callable[[str, How], bool]) -> Iterator[Value]:
    """Give the values that are secret, in their order.

    What stands behind a name that is none of a secret is looked at, too: JAVA_OPTS=-Dpassword=x.

    Args:
        is_secret: whether a value with this name is; told, too, how the two are joined.
    """
    at = 0
    while name := _NAME.search(text, at):
        at, form = name.end(), str(name.lastgroup)
        if form == "colon" and text[name.start() - 1 : name.start()] in ("/", "@"):
            continue  # of a path, a URL or an image
        if is_secret(name["option"] or name["name"], _how(form, text, name.start())):
            value = _value(text, at, form)
            at = value.end
            if value.stop > value.start:
                yield value


def _how(form: str, text: str, start: int) -> How:
    if form == "quoted":
        return How.QUOTED
    if form == "colon":
        return How.VAGUE
    before = text[max(0, start - 64) : start]
    word = before.rstrip(" \t")
    # At the beginning of a line it is YAML's, or a header's, which may be quoted.
    is_running = len(word) < len(before) and word[-1:] not in ("", "\n", "\r", "-")
    return How.VAGUE if form == "line" and is_running else How.PLAIN


def _value(text: str, at: int, form: str) -> Value:
    if opening := _OPENING.match(text, at):
        stop, end = _closing(text, opening)
        # Of JSON the quotes stay; a shell's say nothing without what is between them.
        return Value(opening.end(), stop, end) if form == "quoted" else Value(at, end, end)
    match = _VALUES[form].match(text, at)
    end = match.end() if match else at
    return Value(at, end, end)


def _closing(text: str, opening: re.Match[str]) -> tuple[int, int]:
    """Return where a string stops, and where its closing quote ends; both the end if it has none.

    A string in a string has a backslash before its quotes, and each string around that doubles
    them and adds one: 0, 1, 3, 7.
    """
    depth, at = len(opening[1]) + 1, opening.end()
    while quote := _CLOSING[opening[2]].search(text, at):
        at = quote.end()
        backslashes = len(quote[1])
        if backslashes + 1 < depth:  # the string around it ends
            return quote.start(), quote.start()
        if (backslashes + 1) // depth % 2:  # else they escape it
            return at - depth, at
    return len(text), len(text)
