"""The fingerprint: one short name for all crashes of the same bug.

It is a hash of the signal, the program's name and the functions at the top of the crashing
thread's stack, after everything is taken out that differs between hosts, builds and runs:
addresses, offsets, paths, whether a function was inlined, what compilers append to names,
template arguments, how deep a recursion went, and the functions that only carry out an abort. The
C library's are told as one: which of several memcpy(3) is chosen depends on the processor, how
free(3) is called on the version, and most have no name where its debug information is missing.

What it cannot even out:

- A function that was inlined is missing from the stack where there is no debug information. Of C++
  and Rust it is left out always, because debug information tells its name without its class.
- A program without symbols has no names to go by. Its functions are told by build ID and
  offset, so that two bugs of it do not look alike: the same bug matches on every host that runs
  this very build, but in no other build, and not where its debug information is at hand: there
  `of_build` links them. A
  library's function without a name is known by the library alone.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

FRAMES = 6  # deeper ones tell how a bug was reached rather than which it is
LONGEST = 16 * 1024  # characters of a name that are looked at; C++ symbols can have megabytes
_MAYBE_CUT = 1024  # characters, backtrace.MAX_TEXT; of such a name the end may be missing
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
_CGO_HASH = re.compile(r"(?<=_cgo_)[0-9a-f]{12}_")  # of the package's files
_LAMBDA = re.compile(  # one may be within another
    r"\{lambda(?:[^{}]|\{\w+\})*\}|'lambda\d*'|\$_\d+|\{\{closure\}\}|\{closure#\d+\}"
    r"|<lambda[^<>]*>"
)
_ANONYMOUS = re.compile(r"\(anonymous namespace\)|<unnamed>|_GLOBAL__N_1")
# Template arguments, parameters with what qualifies the object, Go's type arguments; not Rust's
# <Type as Trait>, of which the type may be (A, B) or [T], nor its <impl Trait for Type>, nor
# operator[].
_INNERMOST = re.compile(
    r"<(?!impl |[^<>()]*\{as\})[^<>()]*>"
    r"|\([^<>()]*\)(?!\{as\})(?: (?:const|volatile|&&?))*|\[[^\[\]]+\](?!\{as\})"
)
_NOT_CLOSED = re.compile(r"(?<!operator)(?<!operator<)<.*|\(.*", re.DOTALL)
_RETURNS_POINTER = re.compile(r"\((?:[\w:{}]*::)?\*([\w:{}~]+)\)")  # to a function: void (*f)
_WORD = re.compile(r"\w")
_RESERVED = re.compile(r"(^|::)_+(?:GI_+)?")
_SHARED_OBJECT = re.compile(r"^(.+?)(?:-[\d.]+)?\.so(?:\.[\d.]+)?$")

_C_LIBRARY = "libc.so"  # as all frames of it are told
_C_LIBRARIES = re.compile(r"(?:libc|libm|libpthread|ld|ld64|ld-(?:linux|musl).*|libc\.musl-.*)\.so")
# In a static program: what crashes there on behalf of its caller, and its kinds for processors.
_C_FUNCTIONS = re.compile(
    r"(?:libc_|int_)?(?:c?free|[cm]alloc|realloc|mem(?:p?cpy|move|set|r?chr|cmp)|rawmemchr"
    r"|(?:str|wcs)(?:n?(?:len|cpy|cat|cmp|casecmp|dup)|r?chr(?:nul)?|str|c?spn|pbrk|tok)|stpn?cpy"
    r"|wmem(?:p?cpy|move|set|chr|cmp))(?:_chk)?"
    r"(?:_(?:avx|evex|s?sse|erms|unaligned|rtm|generic|a?simd|sve|mops|a64fx|thunderx|falkor)\w*)?"
)
# Their functions carry out an abort, too, and have no name where symbols are missing; so do those
# of Go's runtime.
_RUNTIMES = re.compile(r"(?:libstdc\+\+|libc\+\+|libc\+\+abi|libgcc_s|libunwind)\.so|\[vdso\]")
_GO_RUNTIME = "runtime."

# Who ends a process on behalf of the function that found the fault.
_MESSENGERS = frozenset(
    """
    raise gsignal abort kill killpg tgkill pthread_kill pthread_sigqueue
    pthread_kill_implementation pthread_kill_internal libc_signal_restore_set
    assert_fail assert_fail_base assert_perror_fail fortify_fail chk_fail stack_chk_fail
    libc_message libc_message_impl libc_fatal malloc_printerr
    restore_rt kernel_vsyscall kernel_rt_sigreturn syscall
    std::terminate cxa_throw cxa_rethrow cxa_pure_virtual cxa_call_terminate
    cxa_bad_cast cxa_bad_typeid cxa_throw_bad_array_new_length
    clang_call_terminate abort_message demangling_terminate_handler cxxabiv1::failed_throw
    gnu_cxx::verbose_terminate_handler cxxabiv1::terminate gxx_personality_v0
    std::rethrow_exception std::glibcxx_assert_fail std::replacement_assert
    rust_panic rust_begin_unwind rust_start_panic rust_abort std::process::abort
    core::option::unwrap_failed core::option::expect_failed core::result::unwrap_failed
    runtime.raise runtime.dieFromSignal runtime.crash runtime.gopanic
    runtime.newstack runtime.morestack runtime.morestack_noctxt
    runtime.maps_fatal internal/runtime/maps.fatal
    sync.throw sync.fatal internal/sync.throw internal/sync.fatal
    os::abort VMError::report_and_die JVM_handle_linux_signal g_log g_logv
    """.split()  # noqa: SIM905 - ninety quoted names are harder to read
)
_MESSENGER_PREFIXES = (
    *("asan", "ubsan", "tsan", "msan", "sanitizer", "interceptor", "hwasan"),
    *("std::throw_", "std::1::throw_", "std::1::libcpp_verbose_abort", "Unwind_"),
    *("core::panicking::", "std::panicking::", "rustc::rust_", "panic_abort::"),
    *("std::sys::", "std::sys_common::backtrace::"),
    *("runtime.sig", "runtime.panic", "runtime.goPanic"),
    *("runtime.throw", "runtime.fatal", "runtime.dopanic"),
)

# What lies below every stack, beside the C library; it differs between versions.
_BASE = frozenset(
    """
    _start _start_c __libc_start_main __libc_start_main_impl __libc_start_call_main
    libc_start_main_stage2 __libc_csu_init runtime.goexit
    start_thread thread_start clone clone3 __clone __clone3 __GI___clone3
    """.split()  # noqa: SIM905 - as above
)


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
    return _digest("crashbus fingerprint 2", signal_name, _program(program), *names)


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
    known = _above_base(list(map(_step, calls)))
    # All of them, if nothing but a messenger is there: a program can abort by itself.
    said = known[_messengers(known) :] or known
    return tuple(islice(dict.fromkeys(step.name for step in said), FRAMES))


@dataclass(frozen=True)
class _Step:
    """A frame as it is told.

    Attributes:
        is_messenger: by its name.
        is_runtime: it is the C library's, or of another that carries out an abort: a messenger if
            one comes below it.
    """

    name: str
    is_messenger: bool = False
    is_runtime: bool = False

    @property
    def is_base(self) -> bool:
        return self.name == _C_LIBRARY or self.name in _BASE


def _step(call: Call) -> _Step:
    name, module = _name(call), _module(call.module)
    bare = _RESERVED.sub(r"\1", name)
    is_messenger = bare in _MESSENGERS or bare.startswith(_MESSENGER_PREFIXES)
    if _C_LIBRARIES.fullmatch(module) or _C_FUNCTIONS.fullmatch(bare):
        return _Step(_C_LIBRARY, is_messenger, is_runtime=True)
    is_runtime = _RUNTIMES.fullmatch(module) is not None or name.startswith(_GO_RUNTIME)
    return _Step(name, is_messenger, is_runtime)


def _above_base(steps: list[_Step]) -> list[_Step]:
    """Return what lies above the base of a stack."""
    end = len(steps)
    while end and steps[end - 1].is_base:
        end -= 1
    # If nothing else is there, the C library's own thread crashed.
    return [step for step in steps[:end] or steps if step.name not in _BASE]


def _messengers(steps: list[_Step]) -> int:
    """Return how many frames at the top carry out what a function below them wanted."""
    count = 0
    for number, step in enumerate(steps, 1):
        if step.is_messenger:
            count = number
        elif not step.is_runtime:
            break
    return count


def normalise(symbol: str) -> str:
    """Return a function's name without what compilers, linkers and builds add to it."""
    whole = symbol[:LONGEST]
    name = _shortened(whole)
    return name if _WORD.search(name) else whole  # a form that is not known here


def _shortened(symbol: str) -> str:
    name = _SYMBOL_VERSION.sub("", symbol)
    name = _GO_CLOSURE.sub("{closure}", name.removesuffix("-fm"))
    name = _CGO_HASH.sub("", name)
    name = _CLONE.sub("", name) or name
    name = _RUST_HASH.sub("", name)
    name = _RUST_CRATE.sub("", name) if name.startswith("_R") else name
    name = _ANONYMOUS.sub("{anonymous}", name)
    name = _until_stable(lambda one: _LAMBDA.sub("{lambda}", one), name)
    name = name.replace("operator()", "operator{call}").replace(" as ", "{as}")
    name = _GO_RECEIVER.sub(r".\1.", name)
    name = _until_stable(lambda one: _INNERMOST.sub("", _RETURNS_POINTER.sub(r"\1", one)), name)
    if len(symbol) >= _MAYBE_CUT and "{as}" not in name:
        name = _NOT_CLOSED.sub("", name)
    return _without_result(name.partition(" requires ")[0].replace(", ", ","))


def _until_stable(change: Callable[[str], str], name: str) -> str:
    """Change a name from the innermost brackets outwards."""
    while (changed := change(name)) != name:
        name = changed
    return name


def _without_result(name: str) -> str:
    """Return a name without the type that comes before it; where brackets are left, in Rust, none
    does.
    """
    before, operator, behind = name.partition("operator")
    plain, bracket, type_ = before.partition("<")
    return plain.rpartition(" ")[2] + bracket + type_ + operator + behind.rstrip()


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
