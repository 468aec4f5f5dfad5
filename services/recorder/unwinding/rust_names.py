"""Names of Rust functions, undone of the mangling "v0", which is Rust's usual one since 2025.

https://doc.rust-lang.org/rustc/symbol-mangling/v0.html gives the grammar; each method here is one
rule of it. What tells builds apart (hashes of crates) and lifetimes are left out, type arguments
stand as in C++: ``crate::Type<u8>::function``. A symbol is an attacker's to write, and a reference
in it repeats what stands before, so depth, steps and length are bounded.
"""

import re
from collections.abc import Callable

_DEEPEST = 64  # rules within each other
_MOST_STEPS = 5_000
_LONGEST = 8_192  # characters
_LONGEST_NUMBER = 11  # digits in base 62, of 64 bits
_MOST_ARGUMENTS = 256
_SYMBOL = re.compile(r"_R([A-Z][0-9A-Za-z_]*)(?:\.[\w.$@]*)?")  # and what compilers append
_TYPES = dict(
    zip(
        "abcdefhijlmnopstuvxyz",
        [
            "i8",
            "bool",
            "char",
            "f64",
            "str",
            "f32",
            "u8",
            "isize",
            "usize",
            "i32",
            "u32",
            "i128",
            "u128",
            "_",
            "i16",
            "u16",
            "()",
            "...",
            "i64",
            "u64",
            "!",
        ],
        strict=True,
    )
)
_SIZE = re.compile(r"0|[1-9][0-9]{0,4}")  # ASCII, of which no other digits are
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SPECIAL = {"C": "closure", "S": "shim"}


class _Bad(Exception):
    """It is no such name, or more than anybody wants to read."""


def readable(symbol: str) -> str | None:
    """Return what a symbol stands for; None: it is none of this kind, or too much."""
    found = _SYMBOL.fullmatch(symbol)
    if not found:
        return None
    try:
        return _Parser(found[1]).path()
    except _Bad:
        return None


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._steps = 0
        self._length = 0

    def path(self) -> str:
        return self._rule(self._path)

    def _path(self) -> str:
        match self._next():
            case "C":
                return self._identifier()[1]
            case "M":
                self._impl_path()
                return self._type()
            case "X":
                self._impl_path()
                return f"<{self._type()} as {self.path()}>"
            case "Y":
                return f"<{self._type()} as {self.path()}>"
            case "N":
                return self._nested()
            case "I":
                return f"{self.path()}<{', '.join(self._until_end(self._argument))}>"
            case "B":
                return self._back(self.path)
            case other:
                raise _Bad(other)

    def _nested(self) -> str:
        kind, before = self._next(), self.path()
        number, name = self._identifier()
        if kind.islower():
            return f"{before}::{name}" if name else before
        if not kind.isupper():
            raise _Bad(kind)
        special = _SPECIAL.get(kind, kind)
        return f"{before}::{{{special}{':' if name else ''}{name}#{number}}}"

    def _impl_path(self) -> None:
        """Skip where an implementation stands: its type tells enough."""
        self._number_behind("s")
        self.path()

    def _type(self) -> str:
        return self._rule(self._any_type)

    def _any_type(self) -> str:
        kind = self._next()
        if kind in _TYPES:
            return _TYPES[kind]
        match kind:
            case "A":
                return f"[{self._type()}; {self._const()}]"
            case "S":
                return f"[{self._type()}]"
            case "T":
                parts = self._until_end(self._type)
                return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
            case "R" | "Q":
                self._lifetime()
                return f"&{'mut ' if kind == 'Q' else ''}{self._type()}"
            case "P" | "O":
                return f"*{'mut' if kind == 'O' else 'const'} {self._type()}"
            case "F":
                return self._function()
            case "D":
                return self._dynamic()
            case "B":
                return self._back(self._type)
            case _:
                self._at -= 1
                return self.path()

    def _function(self) -> str:
        self._number_behind("G")
        unsafe = "unsafe " if self._take("U") else ""
        abi = ""
        if self._take("K"):
            name = "C" if self._take("C") else self._undisambiguated().replace("_", "-")
            abi = f'extern "{name}" '
        taken = ", ".join(self._until_end(self._type))
        given = self._type()
        return f"{unsafe}{abi}fn({taken})" + ("" if given == "()" else f" -> {given}")

    def _dynamic(self) -> str:
        self._number_behind("G")
        traits = self._until_end(self._trait)
        self._lifetime()
        return f"dyn {' + '.join(traits)}"

    def _trait(self) -> str:
        name, bound = self.path(), []
        while self._take("p"):
            bound.append(f"{self._undisambiguated()} = {self._type()}")
        if bound and name.endswith(">"):
            return f"{name[:-1]}, {', '.join(bound)}>"
        return f"{name}<{', '.join(bound)}>" if bound else name

    def _argument(self) -> str | None:
        if self._peek() == "L":
            self._lifetime()
            return None
        return self._const() if self._take("K") else self._type()

    def _const(self) -> str:
        return self._rule(self._any_const)

    def _any_const(self) -> str:
        kind = self._next()
        if kind == "p":
            return "_"
        if kind == "B":
            return self._back(self._const)
        if kind not in _TYPES:
            raise _Bad(kind)  # structures and strings, which are not yet in any stable Rust
        sign = "-" if self._take("n") else ""
        digits = self._text[self._at :].partition("_")[0]
        self._at += len(digits) + 1
        if len(digits) > 32 or digits.strip("0123456789abcdef"):
            raise _Bad(digits)
        value = int(digits or "0", 16)
        match _TYPES[kind]:
            case "bool":
                return "true" if value else "false"
            case "char":
                return f"'\\u{{{value:x}}}'"
            case _:
                return f"{sign}{value}"

    def _lifetime(self) -> None:
        self._step()
        self._number_behind("L")

    def _identifier(self) -> tuple[int, str]:
        return self._number_behind("s"), self._undisambiguated()

    def _undisambiguated(self) -> str:
        is_unicode = self._take("u")
        digits = _SIZE.match(self._text, self._at)
        if not digits:
            raise _Bad("no size")
        size, self._at = int(digits[0]), digits.end()
        self._take("_")
        name = self._text[self._at : self._at + size]
        if len(name) != size:
            raise _Bad(name)
        self._at += size
        return _of_punycode(name) if is_unicode else name

    def _number_behind(self, mark: str) -> int:
        """Read an optional number in base 62; 0 where there is none, and then one more for each."""
        return self._number() + 1 if self._take(mark) else 0

    def _number(self) -> int:
        end = self._text.find("_", self._at, self._at + _LONGEST_NUMBER + 1)
        if end < 0:
            raise _Bad("no number")
        digits, self._at = self._text[self._at : end], end + 1
        value = 0
        for digit in digits:
            value = value * 62 + _DIGITS.index(digit)
        return value + 1 if digits else 0

    def _back(self, rule: Callable[[], str]) -> str:
        """Read once more what stands at an earlier place."""
        begin = self._at - 1
        place = self._number()
        if place >= begin:
            raise _Bad(str(place))
        behind, self._at = self._at, place
        text = rule()
        self._at = behind
        return text

    def _until_end(self, rule: Callable[[], str | None]) -> list[str]:
        found: list[str] = []
        while not self._take("E"):
            one = rule()
            if one is not None:
                found.append(one)
            if len(found) > _MOST_ARGUMENTS:
                raise _Bad("too many")
        return found

    def _rule(self, rule: Callable[[], str]) -> str:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _Bad("too deep")
        self._step()
        text = rule()
        self._depth -= 1
        self._length += len(text)
        if self._length > _LONGEST * _DEEPEST or len(text) > _LONGEST:
            raise _Bad("too long")  # each rule copies what those in it gave
        return text

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise _Bad("too long")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, character: str) -> bool:
        found = self._peek() == character
        self._at += found
        return found

    def _next(self) -> str:
        character = self._peek()
        if not character:
            raise _Bad("it ends too soon")
        self._at += 1
        return character


def _of_punycode(name: str) -> str:
    """Return a name with what is not ASCII; RFC 3492, with _ for its -."""
    before, _, behind = name.rpartition("_")
    try:
        return (f"{before}-{behind}" if before else behind).encode().decode("punycode")
    except (UnicodeError, ValueError):
        return name
