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
  `of_build` links them. A library's function without a name is known by the library alone.
- A symbol of C++ that `demangling` leaves as it is has its template arguments in it.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

FRAMES = 6  # deeper ones tell how a bug was reached rather than which it is
# Where they have no name: those at the top may all be a runtime's that is linked into the program,
# as Rust's, Go's or C++'s, and carry out an abort.
PLACES = 32
LONGEST = 16 * 1024  # characters of a name that are looked at; C++ symbols can have megabytes
_MAYBE_CUT = 1024  # characters, backtrace.MAX_TEXT; of such a name the end may be missing
_DEEPEST = 32  # brackets within each other; symbols are an attacker's to write
_REMEMBERED = 2048  # names; a crash is asked for its own several times
_DIGITS = 16  # hexadecimal: enough for 10^8 bugs without two that share one

# No pattern may look at a place again for each that it begins at, for symbols are an attacker's to
# write. So of what stands at the end, one part is found at a time.
# GCC, Clang and linkers: f.isra.0, f.part.1.cold, f.llvm.42, f [clone .constprop.0]
_CLONE = re.compile(
    r" \[clone [^\[\]]*\]"
    r"|\.(?:isra|part|constprop|cold|hot|unlikely|llvm|lto_priv|localalias|clone|__uniq|abi0|\d+)"
    r"(?=[. ]|$)"
)
_RUST_HASH = re.compile(r"(::h|17h)[0-9a-f]{16}E?$")
_RUST_CRATE = re.compile(r"(?<=C)s[0-9A-Za-z]{0,11}_(?=\d)")  # RFC 2603: which of a name's crates
_GO_CLOSURE = re.compile(r"(?:\.func|\.gowrap|\.deferwrap|-range)\d+(?:\.\d+)*")
_GO_RECEIVER = re.compile(r"\.\(\*?([^()*]+)\)\.")
_CGO_HASH = re.compile(r"(?<=_cgo_)[0-9a-f]{12}_")  # of the package's files
_LAMBDA = re.compile(  # one may be within another
    r"\{lambda(?:[^{}]|\{\w+\})*\}|'lambda\d*'|\$_\d+|\{\{closure\}\}|\{closure#\d+\}"
    r"|<lambda[^<>]*>"
)
_ANONYMOUS = re.compile(r"\(anonymous namespace\)|<unnamed>|_GLOBAL__N_1")
_ARROW = re.compile(r"(?<!operator)->")  # to a member, or before what a function returns
_COMPARED = re.compile(r"\)(?:<=>|<[<=]?|>=)\(")  # in an expression; > is in brackets of its own
# Template arguments, parameters with what qualifies the object, Go's type arguments; not Rust's
# <Type as Trait>, of which the type may be (A, B) or [T], nor its <impl Trait for Type>, nor
# operator[].
_INNERMOST = re.compile(
    r"<(?!impl |[^<>()]*\{as\})[^<>()]*>"
    # > or < that have no other within ( ) compare.
    r"|\([^<>()]*(?:>[^<>()]*)*(?:<[^<>()]*)*\)(?!\{as\})(?: (?:const|volatile|&&?))*"
    r"|\[[^\[\]]+\](?!\{as\})"
)
# Of what is cut, or too deep.
_NOT_CLOSED = re.compile(r"(?<!operator)(?<!operator<)<.*|\(.*", re.DOTALL)
_RETURNS_POINTER = re.compile(r"\((?:[\w:{}]*::)?\*([\w:{}~]+)\)")  # to a function: void (*f)
_WORD = re.compile(r"\w")
_RESERVED = re.compile(r"(^|::)_+(?:GI_+)?")
_SHARED_OBJECT = re.compile(r"^(.+?)(?:-[\d.]+)?\.so(?:\.[\d.]+)?$")

_C_LIBRARY = "libc.so"  # as all frames of it are told
_PLACE = "? at "  # how it is told what has no name in a program,
_UNKNOWN = "? in ?"  # and in nothing that is known
_C_LIBRARIES = re.compile(r"(?:libc|libm|libpthread|ld|ld64|ld-(?:linux|musl).*|libc\.musl-.*)\.so")
# In a static program: what crashes there on behalf of its caller, and its kinds for processors.
_C_FUNCTIONS = re.compile(
    r"(?:libc_|int_)?(?:c?free|[cm]alloc|realloc|mem(?:p?cpy|move|set|r?chr|cmp)|rawmemchr"
    r"|(?:str|wcs)(?:n?(?:len|cpy|cat|cmp|casecmp|dup)|r?chr(?:nul)?|str|c?spn|pbrk|tok)|stpn?cpy"
    r"|wmem(?:p?cpy|move|set|chr|cmp))(?:_chk)?"
    r"(?:_(?:avx|evex|s?sse|erms|unaligned|rtm|generic|a?simd|sve|mops|a64fx|thunderx|falkor)\w*)?"
    r"|v?(?:as|f|s|sn|w|fw|sw)?printf(?:_chk|_internal|_positional)?|X?w?printf_(?:buffer|fp)\w*"
    r"|(?:isoc\d+_)?v?[fs]?w?scanf(?:_chk|_internal)?"
    r"|f?puts|fputc|fgets|fread|fwrite|fopen|fclose|fflush|qsort(?:_r)?|msort_with_tmp|bsearch"
    r"|malloc_consolidate|unlink_chunk|sysmalloc|systrim|restore_rt"
    r"|pthread_(?:mutex|rwlock|spin|cond|barrier|once|create|join|exit|cancel|[gs]etspecific)\w*"
)
_C_STREAMS = "_IO_"
# Their functions carry out an abort, too, and have no name where symbols are missing; so do those
# of Go's runtime.
_RUNTIMES = re.compile(
    r"(?:libstdc\+\+|libc\+\+|libc\+\+abi|libgcc_s|libunwind|libjvm"
    r"|lib(?:clang_rt\.)?(?:asan|hwasan|lsan|msan|tsan|ubsan)[\w-]*)\.so|\[vdso\]"
)
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
    os::abort VMError::report_and_die JVM_handle_linux_signal javaSignalHandler g_log g_logv
    """.split()  # noqa: SIM905 - ninety quoted names are harder to read
)
# Of whole names: without its underscores each is anybody's.
_MESSENGER_PREFIXES = (
    *("__asan", "__ubsan", "__tsan", "__msan", "__lsan", "__hwasan", "__sanitizer"),
    *("__interceptor_", "___interceptor_"),
    *("std::__throw_", "std::__1::__throw_", "std::__1::__libcpp_verbose_abort", "_Unwind_"),
    *("core::panicking::", "std::panicking::", "__rustc::", "panic_abort::"),
    *("std::sys::", "std::sys_common::backtrace::"),
    *("runtime.sig", "runtime.panic", "runtime.goPanic"),
    *("runtime.throw", "runtime.fatal", "runtime.dopanic"),
)
# Of them, who passes on a signal that came from elsewhere, as a handler does when it is done.
_RAISERS = frozenset(
    """
    raise gsignal kill tgkill pthread_kill pthread_sigqueue
    pthread_kill_implementation pthread_kill_internal syscall
    """.split()  # noqa: SIM905 - as above
)

# What lies below every stack, beside the C library and C++'s; it differs between versions.
_BASE = frozenset(
    """
    _start _start_c __libc_start_main __libc_start_main_impl __libc_start_call_main
    libc_start_main_stage2 __libc_csu_init runtime.goexit
    start_thread thread_start clone clone3 __clone __clone3 __GI___clone3
    execute_native_thread_routine
    core::ops::function::FnOnce::call_once <fn(){as}core::ops::function::FnOnce>::call_once
    """.split()  # noqa: SIM905 - as above
)
_BASE_LIBRARIES = re.compile(r"(?:libstdc\+\+|libc\+\+)\.so")  # they start threads
_RUST_START = "__rust_begin_short_backtrace"  # of the program or a thread; below it is Rust's own


@dataclass(frozen=True)
class Call:
    """A frame, as far as it matters here.

    Attributes:
        symbol: the function's name; None where it has none.
        module: path of the file that its code is in.
        place: build ID, if it has one, + and the offset in it, of what is the program's and no
            library's.
        interrupted: a signal came while it was at work.
    """

    symbol: str | None
    module: str | None = None
    place: str | None = None
    interrupted: bool = False


def fingerprint(signal_name: str, program: str, calls: Iterable[Call]) -> str | None:
    """Return the fingerprint, 16 hexadecimal digits; None for a crash without a stack, or where
    nothing is known of what is on it.

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
    found = (call.place for call in calls if call.place and not call.place.startswith("+"))
    places = tuple(islice(dict.fromkeys(found), PLACES))
    return _digest("crashbus build fingerprint 1", signal_name, *places) if places else None


def _digest(*told: str) -> str:
    text = "\n".join(told).encode("utf-8", "backslashreplace")
    return hashlib.sha256(text).hexdigest()[:_DIGITS]


def frames(calls: Iterable[Call]) -> tuple[str, ...]:
    """Return the names that the fingerprint is made of, innermost first."""
    known = _above_base(list(map(_step, calls)))
    while below := _raised_again(known):
        known = known[below:]
    # All of them, if nothing but a messenger is there: a program can abort by itself.
    said = known[_messengers(known) :] or known
    names = dict.fromkeys(step.name for step in said)
    if set(names) == {_UNKNOWN}:
        return ()
    is_nameless = any(map(_is_place, islice(names, FRAMES)))
    return tuple(islice(names, PLACES if is_nameless else FRAMES))


@dataclass(frozen=True)
class _Step:
    """A frame as it is told.

    Attributes:
        bare: its function's name without leading underscores.
        is_messenger: by its name.
        is_runtime: it is the C library's, or of another that carries out an abort: a messenger if
            one comes below it.
        is_base: it is none of the program if it is at the bottom.
        interrupted: a signal came while it was at work.
    """

    name: str
    bare: str
    is_messenger: bool
    is_runtime: bool
    is_base: bool
    interrupted: bool


def _step(call: Call) -> _Step:
    name, module = _name(call), _module(call.module)
    bare = _RESERVED.sub(r"\1", name)
    is_c = bool(
        _C_LIBRARIES.fullmatch(module)
        or _C_FUNCTIONS.fullmatch(bare)
        or name.startswith(_C_STREAMS)
    )
    is_runtime = bool(_RUNTIMES.fullmatch(module)) or name.startswith(_GO_RUNTIME)
    return _Step(
        name=_C_LIBRARY if is_c else name,
        bare=bare,
        is_messenger=bare in _MESSENGERS or name.startswith(_MESSENGER_PREFIXES),
        is_runtime=is_c or is_runtime,
        is_base=is_c or name in _BASE or bool(_BASE_LIBRARIES.fullmatch(module)),
        interrupted=call.interrupted,
    )


def _above_base(steps: list[_Step]) -> list[_Step]:
    """Return what lies above the base of a stack."""
    end = next((n for n, step in enumerate(steps) if _RUST_START in step.name), len(steps))
    while end and steps[end - 1].is_base:
        end -= 1
    # If nothing else is there, the C library's own thread crashed.
    return steps[:end] or [step for step in steps if step.name not in _BASE]


def _raised_again(steps: list[_Step]) -> int:
    """Return where the function is that a signal came to, if its handler raised it again; or 0.

    Who aborts in a handler may have found something on its own.
    """
    messengers = {step.bare for step in steps[: _messengers(steps)] if step.is_messenger}
    if not messengers or not messengers <= _RAISERS:
        return 0
    return next((n for n in range(1, len(steps)) if _is_interrupted(steps, n)), 0)


def _is_interrupted(steps: list[_Step], number: int) -> bool:
    """Tell whether a handler's frames end above this one."""
    # At the top all were interrupted that are inlined in each other: by the last signal.
    above = steps[number - 1]
    return number < len(steps) and steps[number].interrupted and not above.interrupted


def _messengers(steps: list[_Step]) -> int:
    """Return how many frames at the top carry out what a function below them wanted."""
    count = 0
    for number, step in enumerate(steps, 1):
        # The last of a handler's is __restore_rt, by whatever name.
        if step.is_messenger or (step.is_runtime and _is_interrupted(steps, number)):
            count = number
        elif not step.is_runtime:
            break
    return count


@lru_cache(_REMEMBERED)
def normalise(symbol: str) -> str:
    """Return a function's name without what compilers, linkers and builds add to it."""
    whole = symbol[:LONGEST]
    name = _shortened(whole)
    return name if _WORD.search(name) else whole  # a form that is not known here


def _shortened(symbol: str) -> str:
    name = symbol.partition("@")[0].removesuffix("-fm")  # without its version
    plain = _without_end(_GO_CLOSURE, name)
    name = _CGO_HASH.sub("", name if plain == name else f"{plain}{{closure}}")
    name = _without_end(_CLONE, name) or name
    name = _RUST_HASH.sub("", name)
    name = _RUST_CRATE.sub("", name) if name.startswith("_R") else name
    name = _ANONYMOUS.sub("{anonymous}", name)
    name = _until_stable(lambda one: _LAMBDA.sub("{lambda}", one), name)
    name = name.replace("operator()", "operator{call}").replace(" as ", "{as}")
    name = _GO_RECEIVER.sub(r".\1.", name)
    name = _COMPARED.sub(")(", _ARROW.sub(".", name))
    name = _until_stable(_without_innermost, name)
    is_rust = "{as}" in name or "<impl " in name
    if not is_rust and (len(symbol) >= _MAYBE_CUT or _without_innermost(name) != name):
        name = _NOT_CLOSED.sub("", name)
    return _without_result(name.partition(" requires ")[0].replace(", ", ","), is_rust)


def _without_end(part: re.Pattern[str], name: str) -> str:
    """Return a name without the parts of a kind that stand at its end, one behind the other."""
    begin = end = 0
    for found in part.finditer(name):
        begin = begin if found.start() == end else found.start()
        end = found.end()
    return name[:begin] if end == len(name) else name


def _without_innermost(name: str) -> str:
    return _INNERMOST.sub("", _RETURNS_POINTER.sub(r"\1", name))


def _until_stable(change: Callable[[str], str], name: str) -> str:
    """Change a name from the innermost brackets outwards."""
    for _ in range(_DEEPEST):
        if (changed := change(name)) == name:
            break
        name = changed
    return name


def _without_result(name: str, is_rust: bool) -> str:
    """Return a name without the type that comes before it; in Rust none does before brackets."""
    before, operator, behind = name.partition("operator")
    plain, bracket, type_ = before.partition("<") if is_rust else (before, "", "")
    return plain.rpartition(" ")[2] + bracket + type_ + operator + behind.rstrip()


def _name(call: Call) -> str:
    if call.symbol:
        return normalise(call.symbol)
    if call.place:
        return f"{_PLACE}{call.place}"
    return f"? in {_module(call.module)}"


def _is_place(name: str) -> bool:
    return name.startswith(_PLACE)


def _module(path: str | None) -> str:
    """Return a module's name without its version: libssl.so for /usr/lib/libssl.so.3.0.1."""
    base = _program(path or "?")
    match = _SHARED_OBJECT.match(base)
    return f"{match[1]}.so" if match else base


def _program(path: str) -> str:
    return path.removesuffix(" (deleted)").rpartition("/")[2]
