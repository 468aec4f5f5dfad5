"""The fingerprint: one short name for all crashes of the same bug.

It is a hash of the signal, the program's name and the functions at the top of the crashing
thread's stack, after everything is taken out that differs between hosts, builds and runs:
addresses, offsets, paths, whether a function was inlined, what compilers append to names,
template arguments, how deep a recursion went, and the functions that only carry out an abort.

What it cannot even out:

- A function that was inlined is missing from the stack where there is no debug information. Of C++
  and Rust it is left out always, because debug information tells its name without its class.
- A program without symbols has no names to go by. Its functions are told by build ID and
  offset, so that two bugs of it do not look alike: the same bug matches on every host that runs
  this very build, but in no other build, and not where its debug information is at hand: there
  `of_build` links them. A
  library's function without a name is known by the library alone, since such ones are chosen by
  processor (memcpy).
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

FRAMES = 6  # deeper ones tell how a bug was reached rather than which it is
_LONGEST = 512  # characters of a name that are looked at; C++ symbols can have megabytes
_DIGITS = 16  # hexadecimal: enough for 10^8 bugs without two that share one

# GCC, Clang and linkers: f.isra.0, f.part.1.cold, f.llvm.42, f [clone .constprop.0]
_CLONE = re.compile(
    r"(?: \[clone [^\]]*\]"
    r"|\.(?:isra|part|constprop|cold|hot|unlikely|llvm|lto_priv|localalias|clone|__uniq|abi0)"
    r"(?:\.\d+)*|\.\d+)+$"
)
_SYMBOL_VERSION = re.compile(r"@.*$")
_RUST_HASH = re.compile(r"(::h|17h)[0-9a-f]{16}E?$")
_RUST_CRATE = re.compile(r"(?<=C)s[0-9A-Za-z]*_(?=\d)")  # RFC 2603: which of two crates of a name
_GO_CLOSURE = re.compile(r"(?:(?:\.func|\.gowrap|\.deferwrap|-range)\d+(?:\.\d+)*)+$")
_GO_RECEIVER = re.compile(r"\.\(\*?([^()*]+)\)\.")
_LAMBDA = re.compile(
    r"\{lambda[^{}]*\}|'lambda\d*'|\$_\d+|\{\{closure\}\}|\{closure#\d+\}|<lambda[^<>]*>"
)
_ANONYMOUS = re.compile(r"\(anonymous namespace\)|<unnamed>|_GLOBAL__N_1")
# Template arguments, parameters, Go's type arguments; not Rust's <Type as Trait>, nor operator[].
_INNERMOST = re.compile(r"<(?![^<>()]*\{as\})[^<>()]*>|\([^<>()]*\)(?: const)?|\[[^\[\]]+\]")
_RESERVED = re.compile(r"(^|::)_+")
_SHARED_OBJECT = re.compile(r"^(.+?)(?:-[\d.]+)?\.so(?:\.[\d.]+)?$")

# Who ends a process on behalf of the function that found the fault.
_MESSENGERS = frozenset(
    """
    raise gsignal abort kill killpg tgkill pthread_kill pthread_sigqueue
    pthread_kill_implementation pthread_kill_internal libc_signal_restore_set GI_raise GI_abort
    assert_fail assert_fail_base assert_perror_fail fortify_fail chk_fail stack_chk_fail
    libc_message libc_fatal malloc_printerr restore_rt kernel_vsyscall kernel_rt_sigreturn syscall
    std::terminate cxa_throw cxa_rethrow cxa_pure_virtual
    gnu_cxx::verbose_terminate_handler cxxabiv1::terminate
    rust_panic rust_begin_unwind rust_start_panic rustc::rust_panic rustc::rust_begin_unwind
    rustc::rust_start_panic std::process::abort core::option::unwrap_failed
    core::option::expect_failed core::result::unwrap_failed
    runtime.raise runtime.dieFromSignal runtime.crash runtime.fatalpanic runtime.gopanic
    runtime.throw runtime.fatalthrow runtime.fatal
    os::abort VMError::report_and_die JVM_handle_linux_signal g_log g_logv
    """.split()  # noqa: SIM905 - forty quoted names are harder to read
)
_MESSENGER_PREFIXES = (
    *("asan", "ubsan", "tsan", "msan", "sanitizer", "interceptor", "hwasan"),
    *("core::panicking::", "std::panicking::", "std::throw_"),
    *("runtime.sig", "runtime.panic", "runtime.goPanic"),
)

# What lies below every stack; it differs between C libraries and their versions.
_BASE = frozenset(
    """
    _start __libc_start_main __libc_start_main_impl __libc_start_call_main runtime.goexit
    start_thread thread_start clone clone3 __clone __clone3 __GI___clone3
    """.split()  # noqa: SIM905 - as above
)
_BASE_UNNAMED = frozenset(("? in libc.so", "? in libpthread.so"))


@dataclass(frozen=True)
class Call:
    """A frame, as far as it matters here.

    Attributes:
        symbol: the function's name; None where it has none.
        module: path of the file that its code is in.
        place: build ID and offset in it, of what is the program's and no library's.
    """

    symbol: str | None
    module: str | None = None
    place: str | None = None


def fingerprint(signal_name: str, program: str, calls: Iterable[Call]) -> str | None:
    """Return the fingerprint, 16 hexadecimal digits; None for a crash without a stack.

    Args:
        program: the executable's path, or the process's name.
        calls: the crashing thread's, innermost first.
    """
    names = frames(calls)
    if not names:
        return None
    return _digest("crashbus fingerprint 1", signal_name, _program(program), *names)


def of_build(signal_name: str, calls: Iterable[Call]) -> str | None:
    """Return what a crash has in common with those at the same place of the same build.

    No name is looked at, so that it links crashes of a stripped program with those where its
    symbols were at hand, whose `fingerprint` is another.

    Returns:
        16 hexadecimal digits; None where the program has no build ID or is not on the stack.
    """
    places = tuple(islice(dict.fromkeys(call.place for call in calls if call.place), FRAMES))
    return _digest("crashbus build fingerprint 1", signal_name, *places) if places else None


def _digest(*told: str) -> str:
    text = "\n".join(told).encode("utf-8", "backslashreplace")
    return hashlib.sha256(text).hexdigest()[:_DIGITS]


def frames(calls: Iterable[Call]) -> tuple[str, ...]:
    """Return the names that the fingerprint is made of, innermost first."""
    known = _above_base(list(map(_name, calls)))
    # All of them, if nothing but a messenger is there: a program can abort by itself.
    said = list(_without_messengers(known)) or known
    return tuple(islice(dict.fromkeys(said), FRAMES))


def _above_base(names: list[str]) -> list[str]:
    """Return what lies above the base of a stack, whether the C library has symbols or not."""
    end = len(names)
    while end and (names[end - 1] in _BASE or names[end - 1] in _BASE_UNNAMED):
        end -= 1
    # If nothing else is there, the C library's own thread crashed.
    return [name for name in names[:end] or names if name not in _BASE]


def normalise(symbol: str) -> str:
    """Return a function's name without what compilers, linkers and builds add to it."""
    name = _SYMBOL_VERSION.sub("", symbol[:_LONGEST])
    name = _GO_CLOSURE.sub("{closure}", name.removesuffix("-fm"))
    name = _CLONE.sub("", name) or name
    name = _RUST_HASH.sub("", name)
    name = _RUST_CRATE.sub("", name) if name.startswith("_R") else name
    name = _ANONYMOUS.sub("{anonymous}", name)
    name = _LAMBDA.sub("{lambda}", name)
    name = name.replace("operator()", "operator{call}").replace(" as ", "{as}")
    name = _GO_RECEIVER.sub(r".\1.", name)
    while (shorter := _INNERMOST.sub("", name)) != name:
        name = shorter
    before, operator, behind = name.partition("operator")
    return before.rpartition(" ")[2] + operator + (behind if operator else "")


def _without_messengers(names: list[str]) -> Iterator[str]:
    speaking = False
    for name in names:
        speaking = speaking or not _is_messenger(name)
        if speaking:
            yield name


def _is_messenger(name: str) -> bool:
    bare = _RESERVED.sub(r"\1", name)
    return bare in _MESSENGERS or bare.startswith(_MESSENGER_PREFIXES)


def _name(call: Call) -> str:
    if call.symbol:
        return normalise(call.symbol)
    if call.place:
        return f"? at {call.place}"
    return f"? in {_module(call.module)}"


def _module(path: str | None) -> str:
    """Return a module's name without its version: libssl.so for /usr/lib/libssl.so.3.0.1."""
    base = _program(path or "?")
    match = _SHARED_OBJECT.match(base)
    return f"{match[1]}.so" if match else base


def _program(path: str) -> str:
    return path.removesuffix(" (deleted)").rpartition("/")[2]
