"""Names of functions as their source has them: of C++, of Rust's older form, which is the same, and
of its newer one, `rust_names`.

Symbols are an attacker's to write, and each reference in one to an earlier part of it can double
the name: what has too many of them stays as it is, and so does all that comes when time is up.
"""

import ctypes
import re
import time

from services.recorder.unwinding import rust_names
from services.recorder.unwinding.backtrace import MAX_TEXT
from services.recorder.unwinding.fingerprint import LONGEST, normalise

_LONGEST = 4096  # bytes of a symbol; of C++ libstdc++ takes none beyond 1024
_SECONDS = 2.0  # of CPU time, for all symbols of a crash
# To an earlier part, or to a template argument; at this many a second goes by, in up to 1 GiB,
# which the worker's limits do not let it have for longer. Found from its end: each letter could be
# the beginning.
_REVERSED_REFERENCE, _MOST_REFERENCES = re.compile(r"_[0-9A-Z]*?[ST]"), 20
_PACK, _MOST_PACKS = "Dp", 2  # each repeats what is in it for each argument

# What Rust's older form writes instead of characters that C++ does not have in names.
_RUST = re.compile(r"::h[0-9a-f]{16}$")
_ESCAPED = {
    "$LT$": "<",
    "$GT$": ">",
    "$LP$": "(",
    "$RP$": ")",
    "$RF$": "&",
    "$BP$": "*",
    "$C$": ",",
    "$u20$": " ",
    "$u27$": "'",
    "$u5b$": "[",
    "$u5d$": "]",
    "$u7b$": "{",
    "$u7d$": "}",
    "..": "::",
}

# Loaded once, by the process that forks the workers; drgn needs it, too.
_RUNTIME = ctypes.CDLL("libstdc++.so.6")
# https://itanium-cxx-abi.github.io/cxx-abi/abi.html#demangler
_RUNTIME.__cxa_demangle.restype = ctypes.c_void_p
_RUNTIME.__cxa_demangle.argtypes = [ctypes.c_char_p] + [ctypes.c_void_p] * 3
_RUNTIME.free.argtypes = [ctypes.c_void_p]
_RUNTIME.strnlen.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_RUNTIME.strnlen.restype = ctypes.c_size_t


class Demangler:
    """Demangles the symbols of one crash; each is done once."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}
        self._left = _SECONDS

    def readable(self, symbol: str) -> str | None:
        """Return a function's name and parameters; None: the symbol is its name, or is no such."""
        demangled = rust_names.readable if symbol.startswith("_R") else _demangled
        if len(symbol) > _LONGEST or (demangled is _demangled and not _is_harmless(symbol)):
            return None
        if symbol not in self._known:
            began = time.process_time()
            name = demangled(symbol) if self._left > 0 else None
            self._known[symbol] = name and _fitting(name)
            self._left -= time.process_time() - began
        return self._known[symbol]


def _fitting(name: str) -> str:
    """Return a name that is too long without its arguments: what is cut may be the function."""
    return name if len(name) <= MAX_TEXT else normalise(name)[:MAX_TEXT]


def _is_harmless(symbol: str) -> bool:
    return (
        symbol.startswith("_Z")
        and len(_REVERSED_REFERENCE.findall(symbol[::-1])) <= _MOST_REFERENCES
        and symbol.count(_PACK) <= _MOST_PACKS
    )


def _demangled(symbol: str) -> str | None:
    made = _RUNTIME.__cxa_demangle(symbol.encode("utf-8", "backslashreplace"), None, None, None)
    if not made:
        return None
    try:
        size = _RUNTIME.strnlen(made, LONGEST)
        name = ctypes.string_at(made, size).decode("utf-8", "backslashreplace")
        return _of_rust(name) if _RUST.search(name) else name
    finally:
        _RUNTIME.free(made)


def _of_rust(name: str) -> str:
    for written, meant in _ESCAPED.items():
        name = name.replace(written, meant)
    return name.replace("_<", "<").replace("_{", "{")
