"""The same bug has the same fingerprint, another bug has another."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.recorder.unwinding.backtrace import (
    MAX_FRAMES,
    MAX_TEXT,
    Backtrace,
    Frame,
    LoadedModule,
    Thread,
)
from services.recorder.unwinding.fingerprint import (
    FRAMES,
    LONGEST,
    PLACES,
    Call,
    fingerprint,
    frames,
    normalise,
    of_build,
)

# Parts of symbols that a pattern may begin at, or may divide in several ways.
REPEATED = (
    *(".cold.1", ".1", ".isra", " [clone ", " [clone .1]", ".func1", ".func1.1", "-range12"),
    *("@", "@\n", "Cs", "17h", ".(*", ".(a).", "_cgo_", "{lambda{a}", "{lambda(", "'lambda1"),
    *(
        "(*",
        "(a::",
        "(>",
        "(<",
        "<a ",
        "<impl ",
        "<{as}",
        "(){as}",
        "() &",
        ")<(",
        "->",
        "[a",
        "::_GI_",
    ),
)
LIBC = "/lib/x86_64-linux-gnu/libc.so.6"
LIBSTDCXX = "/usr/lib/x86_64-linux-gnu/libstdc++.so.6"
LIBASAN, LIBJVM = "/usr/lib/libasan.so.8", "/usr/lib/jvm/lib/server/libjvm.so"


def of(*symbols: str | None, program: str = "/usr/bin/app", signal: str = "SIGSEGV") -> str | None:
    return fingerprint(signal, program, [Call(symbol, "/usr/bin/app") for symbol in symbols])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("parse", "read", "main"), ("parse.isra.0", "read.part.3.cold", "main")),
        (("parse", "main"), ("parse.constprop.0", "main [clone .lto_priv.12]")),
        (("parse", "main"), ("parse.llvm.8842", "main", "__libc_start_call_main", "_start")),
        (("memcpy", "main"), ("memcpy@@GLIBC_2.14", "main")),
        (
            ("die", "main"),
            ("__pthread_kill_implementation", "raise", "abort", "__assert_fail", "die", "main"),
        ),
        (("f", "g", "main"), ("f", "f", "f", "g", "main")),
        (("even", "odd", "main"), ("even", "odd", "even", "odd", "even", "main")),
        (("Map<int, A<b>>::at(int) const", "main"), ("Map<char>::at(char) const", "main")),
        (
            ("a::(anonymous namespace)::f()", "main"),
            ("a::_GLOBAL__N_1::f(int)", "main"),
        ),
        (
            ("run()::{lambda(int)#1}::operator()(int) const",),
            ("run()::{lambda()#7}::operator()()",),
        ),
        (("core::f::h0123456789abcdef", "m"), ("core::f::hfedcba9876543210", "m")),
        (("__asan_memcpy", "copy", "main"), ("__interceptor_memcpy", "copy", "main")),
        (
            (
                "(anonymous namespace)::Box<int>::peek(int) const"
                " [clone .constprop.0] [clone .isra.0]",
            ),
            ("(anonymous namespace)::Box<long>::peek(long) const",),
        ),
        (("int app::run<int>(int*)", "main"), ("long app::run<long>(long*)", "main")),
        (("Text::cut[abi:cxx11](int)",), ("Text::cut(int)",)),
        (("void f<A<B>, (C)1>(D (*)(E))", "main"), ("void f<F>()", "main")),
        (  # who says that nobody caught it
            *(("die(int)", "main"),),
            (
                *("raise", "abort", "__gnu_cxx::__verbose_terminate_handler()"),
                *("__cxxabiv1::__terminate(void (*)())", "std::terminate()", "__cxa_throw"),
                *("std::__throw_out_of_range_fmt(char const*, ...)", "die(int)", "main"),
            ),
        ),
        (("Box<int>::value() const &", "main"), ("Box<long>::value() const &", "main")),
        (("A::f() volatile", "main"), ("A::f()", "main")),
        (("A::f(int (&) [3]) const volatile &&", "main"), ("A::f(int)", "main")),
        (("void (*pick<int>(int))(int)", "main"), ("pick(int)", "main")),
        (("int (A::*ns::pick(int))(char)", "main"), ("ns::pick", "main")),
        (  # noexcept, as GCC and Clang have it
            *(("die(int)", "main"),),
            (
                *("std::terminate()", "__cxa_call_terminate", "__gxx_personality_v0"),
                *("_Unwind_RaiseException_Phase2", "_Unwind_RaiseException", "__cxa_throw"),
                *("die(int)", "main"),
            ),
        ),
        (
            ("die(int)", "main"),
            (
                *("abort", "abort_message", "demangling_terminate_handler()"),
                *("std::__terminate(void (*)())", "std::terminate()", "__clang_call_terminate"),
                *("die(int)", "main"),
            ),
        ),
        # Rust: both ways of mangling, each with what one build gives to a name.
        (("<a::A as a::Run>::go::h0123456789abcdef", "m"), ("<a::A as a::Run>::go", "m")),
        (("a::main::{{closure}}::h0123456789abcdef",), ("a::main::{{closure}}",)),
        (("a::main::{{closure}}::h0123456789abcdef",), ("a::main::{closure#1}",)),
        (("a::Map<u8>::at<&str>", "m"), ("a::Map<_>::at<u8>", "m")),
        (("_RNvCs7qoMWBoZgYL_3app5parse", "m"), ("_RNvCsaZ1_3app5parse", "m")),
        (("_RNvCs7qoMWBoZgYL_3app5parse", "m"), ("_RNvC3app5parse", "m")),
        (
            ("core::panicking::panic_fmt::h0123456789abcdef", "a::parse::h0123456789abcdef"),
            ("core::result::unwrap_failed::hfedcba9876543210", "a::parse::hfedcba9876543210"),
        ),
        (
            (
                *("abort", "std::process::abort", "__rustc::__rust_abort"),
                *("panic_abort::__rust_start_panic::abort", "__rustc::__rust_start_panic"),
                *("__rustc::rust_panic", "std::panicking::panic_with_hook"),
                "std::panicking::panic_handler::{closure#0}",
                "std::sys::backtrace::__rust_end_short_backtrace::<std::panicking::f, !>",
                *("__rustc::rust_begin_unwind", "core::panicking::panic_fmt", "a::parse"),
            ),
            (
                *("abort", "std::sys::unix::abort_internal", "std::process::abort"),
                *("rust_panic", "std::sys_common::backtrace::__rust_end_short_backtrace::<f>"),
                *("rust_begin_unwind", "core::panicking::panic", "a::parse"),
            ),
        ),
        (("<(a::A, a::B<u8>) as a::Run>::go",), ("<(a::A,a::B<u16>) as a::Run>::go",)),
        (  # in C++ of which the end is missing
            (f"app::Map<int>::find(std::{'x' * 2000}<a, b",),
            (f"app::Map<{'x' * 1000}>::find(std::pair<std::tuple<a, b",),
        ),
        ((f"bool app::operator< <std::{'x' * 2000}<a",), ("app::operator<",)),
        (
            ("f()::{lambda((anonymous namespace)::T)#1}::operator()()::{lambda(int)#1}",),
            ("f()::{lambda()#2}::operator()()::{lambda()#3}",),
        ),
        (
            ("g<f()::{lambda({lambda()#1})#2}>()::{lambda(f()::{lambda()#7})#8}",),
            ("g<int>()::{lambda()#1}",),
        ),
        (  # of an expression
            ("std::vector<decltype ({parm#1}->x)> ns::f<A>(A*)", "m"),
            ("ns::f<B>(B*)", "m"),
        ),
        (("std::optional<decltype ({parm#1}<{parm#1})> ns::g<A>(A)", "m"), ("ns::g", "m")),
        (("ns::g<A>(A, decltype ({parm#1}<={parm#1}))", "m"), ("ns::g", "m")),
        (("ns::g<A>(std::optional<decltype ({parm#1}>>{parm#1})>)", "m"), ("ns::g", "m")),
        (("std::enable_if<X::value<Y::value, int>::type ns::h<int>(int)", "m"), ("ns::h", "m")),
        (("std::enable_if<(sizeof (A))<(4), A>::type ns::h<A>(A) const", "m"), ("ns::h", "m")),
        (
            (f"std::enable_if<(sizeof (A))<(4), {'x' * 1000}>::type ns::h<A>(A) const", "m"),
            ("ns::h", "m"),
        ),
        (("decltype ({parm#1}->x) f<int>(int)", "m"), ("f", "m")),
        (("ns::P<int>::operator->() const", "m"), ("ns::P<long>::operator->()", "m")),
        (("my::apply<fn() -> u32>", "m"), ("my::apply<fn() -> (u8, fn(u8) -> i8)>", "m")),
        (("my::Foo<fn() -> u32>::bar", "m"), ("my::Foo<u8>::bar", "m")),
        (("int Box<((sizeof (A))>(4))>::get(int)", "m"), ("Box<(bool)1>::get(int)", "m")),
        (("void app::run<int>(int) requires Small<int>", "m"), ("app::run", "m")),
        (("bool app::operator< <int>(Box<int>)", "m"), ("app::operator<(Box)", "m")),
        (("_cgo_0123456789ab_Cfunc_bug", "m"), ("_cgo_fedcba987654_Cfunc_bug", "m")),
        (  # what starts a program in Rust
            (
                *(
                    "a::parse",
                    "a::main",
                    "core::ops::function::FnOnce::call_once::h0123456789abcdef",
                ),
                "std::sys::backtrace::__rust_begin_short_backtrace::h0123456789abcdef",
                *("std::rt::lang_start::{{closure}}", "std::rt::lang_start_internal", "main"),
            ),
            (
                *("a::parse", "a::main", "<fn() as core::ops::function::FnOnce<()>>::call_once"),
                "std::sys::backtrace::__rust_begin_short_backtrace::<fn(), ()>",
                *("std::rt::lang_start::<()>::{closure#0}", "main"),
            ),
        ),
        # Go numbers its closures in the order of the source, and names what it generates.
        (("main.main.func1", "main.main"), ("main.main.func12.3", "main.main")),
        (("main.(*T).Read-fm", "main.main"), ("main.(*T).Read", "main.main")),
        (("main.walk.func1.gowrap2", "m"), ("main.walk.func3", "m")),
        (("main.Map[go.shape.int_0]", "m"), ("main.Map[...]", "m")),
        (
            (
                "runtime.raise.abi0",
                "runtime.sigtramp",
                "runtime.gopanic",
                "runtime.sigpanic",
                "m.f",
            ),
            ("runtime.raise", "runtime.fatalpanic", "runtime.goPanicIndex", "m.f"),
        ),
        (
            (
                *("runtime.raise.abi0", "runtime.dieFromSignal", "runtime.crash"),
                *("runtime.fatalthrow.func1", "runtime.systemstack.abi0"),
                *(
                    "runtime.fatalthrow",
                    "runtime.throw",
                    "sync.throw",
                    "sync.(*Mutex).unlockSlow",
                    "main.f",
                ),
            ),
            ("runtime.fatal", "internal/sync.fatal", "sync.(*Mutex).unlockSlow", "main.f"),
        ),
        (  # too deep
            ("runtime.throw.func1", "runtime.newstack", "runtime.morestack.abi0", "m.f", "m.f"),
            ("m.f",),
        ),
        # The C library: by processor, by version, and in a static program.
        (("__memmove_avx_unaligned_erms", "copy", "main"), ("__memmove_evex", "copy", "main")),
        (("_int_free", "cfree", "drop", "main"), ("__GI___libc_free", "drop", "main")),
        (
            ("__strlen_avx2", "__printf_buffer", "__vfprintf_internal", "printf", "say", "main"),
            ("strlen", "_IO_vfprintf", "fprintf", "say", "main"),
        ),
        (("less", "msort_with_tmp.part.0", "qsort", "main"), ("less", "qsort_r", "main")),
        (("unlink_chunk.isra.0", "malloc_consolidate", "main"), ("malloc", "main")),
        (("__GI___pthread_mutex_lock", "main"), ("___pthread_rwlock_wrlock", "main")),
    ],
)
def test_pairs_that_must_match(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert of(*one) is not None
    assert of(*one) == of(*other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("parse", "main"), ("print", "main")),
        (("parse", "read", "main"), ("read", "parse", "main")),
        (("parse", "main"), ("parse", "read", "main")),
        (("A::f(int)", "main"), ("B::f(int)", "main")),
        (("main.parse", "main.main"), ("main.print", "main.main")),  # Go
        (("operator<", "main"), ("operator>", "main")),
        (("abort", "main"), ("abort", "check", "main")),
        (("parse", "main"), (None, "main")),
        (("main.(*A).f", "main.main"), ("main.(*B).f", "main.main")),
        (("main.f.func1", "main.main"), ("main.f", "main.main")),
        (("A::operator[](int)", "main"), ("A::operator()(int)", "main")),
        (("A::operator int() const", "main"), ("B::operator int() const", "main")),
        (("<a::A as a::Run>::go", "m"), ("<a::B as a::Run>::go", "m")),
        (("<Vec<T> as a::Run>::go", "m"), ("<Box<T> as a::Run>::go", "m")),
        (("<(A, B) as a::Run>::go", "m"), ("<(B, A) as a::Run>::go", "m")),
        (("<[A] as a::Run>::go", "m"), ("<[B] as a::Run>::go", "m")),
        (("<[A] as a::Run>::go", "m"), ("<(A,) as a::Run>::go", "m")),
        (("<dyn a::A as a::Run>::go", "m"), ("a::A as a::Run>::go", "m")),
        (("a::<impl From<u8> for B>::from",), ("a::<impl From<u8> for C>::from",)),
        (("a::<impl From<u8> for B>::from",), ("a::<impl Into<u8> for B>::from",)),
        (("std::vector<decltype ({parm#1}->x)> f(A*)",), ("std::vector<A> g(A*)",)),
        (("A::operator->()", "m"), ("A::operator.()", "m")),
        (("my::apply<fn() -> u32>", "m"), ("my::other<fn() -> u32>", "m")),
        (("<fn() -> u32 as my::Tr>::run", "m"), ("<fn() -> u8 as my::Tr>::run", "m")),
        (("<fn() -> u32 as my::Tr>::run", "m"), ("<fn() -> u32 as my::Tr>::go", "m")),
        (("f.1x", "m"), ("f", "m")),
        ((f"app::Map<{'x' * 2000}>::find", "m"), (f"app::Map<{'x' * 2000}>::erase", "m")),
        (("_RNvCs7qo_3app5parse", "m"), ("_RNvCs7qo_3app5print", "m")),
        (("(anonymous namespace)::f(int)", "main"), ("f(int)", "main")),
        (("A::f() const &", "main"), ("A::g() const &", "main")),
        (("int (&f(int)) [3]", "main"), ("int (&g(int)) [3]", "main")),
        (
            ("runtime.fatal", "runtime.mapassign", "m.f"),
            ("runtime.fatal", "runtime.mapassign", "m.g"),
        ),
        (
            (
                "runtime.throw",
                "runtime.findObject",
                "runtime.systemstack",
                "runtime.gcBgMarkWorker",
            ),
            (
                "runtime.throw",
                "runtime.greyobject",
                "runtime.systemstack",
                "runtime.gcBgMarkWorker",
            ),
        ),
        (("strlen_utf8", "main"), ("strlen", "main")),
        (("free", "drop", "main"), ("drop", "main")),
        # What is the program's is not taken for who carries out an abort, nor for what is below it.
        (("sanitizer_tag", "main"), ("main",)),
        (("interceptors::Chain::run", "main"), ("main",)),
        (("asan::check", "main"), ("main",)),
        (("IO_read", "main"), ("read", "main")),
        (("IO_read", "main"), ("_IO_read", "main")),
        (("printf_color", "main"), ("printf", "main")),
        (("parse", "clone", "run", "main"), ("parse", "run", "main")),
        (("parse", "start_thread", "run", "main"), ("parse", "run", "main")),
    ],
)
def test_pairs_that_must_not_match(
    one: tuple[str | None, ...], other: tuple[str | None, ...]
) -> None:
    assert of(*one) != of(*other)


def test_program_and_signal_tell_bugs_apart_and_its_place_does_not() -> None:
    assert of("f") == of("f", program="/opt/v2/app") == of("f", program="/opt/app (deleted)")
    assert of("f") != of("f", program="/usr/bin/other")
    assert of("f") != of("f", signal="SIGABRT")


def test_function_without_a_name_is_known_by_its_module() -> None:
    one, newer, other = (
        fingerprint("SIGSEGV", "app", [Call(None, path)])
        for path in ("/lib/libssl.so.3", "/usr/lib64/libssl.so.3.0.11", "/lib/libm.so.6")
    )

    assert one == newer
    assert one != other


def test_program_s_function_without_a_name_is_known_by_its_place() -> None:
    one, other = (
        [Call(None, "/bin/app", f"abcdef+{place}"), Call(None, "/bin/app")] for place in "12"
    )
    moved = [Call(None, "/opt/app", "abcdef+1"), Call(None, "/opt/app")]

    assert fingerprint("SIGSEGV", "app", one) == fingerprint("SIGSEGV", "app", moved)
    assert fingerprint("SIGSEGV", "app", one) != fingerprint("SIGSEGV", "app", other)


def test_build_is_told_by_places_in_the_program_alone() -> None:
    libc = Call("raise", "/lib/libc.so.6")
    named = [libc, Call("parse", "/bin/app", "ab+1"), Call("main", "/bin/app", "ab+2")]
    bare = [Call(None, "/lib/libc.so.6"), *(Call(None, "/bin/app", f"ab+{n}") for n in "12")]
    other = [libc, Call("parse", "/bin/app", "ab+3"), Call("main", "/bin/app", "ab+2")]

    assert of_build("SIGSEGV", named) == of_build("SIGSEGV", bare) is not None
    assert of_build("SIGSEGV", named) != of_build("SIGABRT", named)
    assert of_build("SIGSEGV", named) != of_build("SIGSEGV", other)
    assert of_build("SIGSEGV", [libc]) is None


def test_program_s_functions_without_names_are_told_below_what_carries_out_a_panic() -> None:
    """A runtime that is linked into a program has no name there, either."""
    runtime = [Call(None, "/bin/app", f"ab+{place}") for place in range(100, 110)]
    one, other = ([*runtime, Call(None, "/bin/app", f"ab+{place}")] for place in "12")
    deep = [Call(None, "/bin/app", f"ab+{place}") for place in range(200, 200 + PLACES)]

    assert fingerprint("SIGABRT", "app", one) != fingerprint("SIGABRT", "app", other)
    assert of_build("SIGABRT", one) != of_build("SIGABRT", other)
    assert frames([*deep, *one]) == frames([*deep, *other])
    assert of_build("SIGABRT", [*deep, *one]) == of_build("SIGABRT", [*deep, *other])


def test_stack_of_which_nothing_is_known_has_none() -> None:
    assert fingerprint("SIGSEGV", "app", [Call(None)]) is None
    assert frames([Call(None), Call(None), Call("start_thread", LIBC)]) == ()
    assert frames([Call(None), Call("main")]) == ("? in ?", "main")
    assert frames([Call(None), Call(None, "/lib/libjit.so")]) == ("? in ?", "? in libjit.so")


def backtrace(*told: Frame, build_id: str | None = "ab") -> Backtrace:
    program = LoadedModule(path="/a", start=0x1000, end=0x9000, build_id=build_id, is_program=True)
    return Backtrace(threads=(Thread(tid=1, frames=told),), modules=(program,))


def test_program_without_build_id_is_told_by_offsets_alone() -> None:
    one, other = (
        backtrace(Frame(pc=0x1000 + place, module=0), build_id=None).calls() for place in (5, 6)
    )

    assert frames(one) == ("? at +5",)
    assert frames(other) == ("? at +6",)
    assert of_build("SIGSEGV", one) is None  # of which build is not known
    assert of_build("SIGSEGV", backtrace(Frame(pc=0x1005, module=0)).calls()) is not None


def test_what_is_inlined_does_not_count_in_a_program_with_c_plus_plus() -> None:
    parse, main = (
        Frame(pc=0x1000, symbol=symbol, readable=name, module=0)
        for symbol, name in (("_ZN1A5parseEv", "A::parse()"), ("main", None))
    )
    inlined = Frame(pc=0x1000, symbol="run", module=0, inlined=True)

    assert frames(backtrace(parse, inlined, main).calls()) == ("A::parse", "main")
    assert frames(backtrace(inlined, main).calls()) == ("run", "main")  # in C it has its name


def test_base_of_a_stack_does_not_count_whether_it_has_symbols_or_not() -> None:
    libc = "/lib/x86_64-linux-gnu/libc.so.6"
    top = [Call("parse"), Call(None, libc), Call("main")]
    bases = (
        [
            Call("__libc_start_call_main", libc),
            Call("__libc_start_main_impl", libc),
            Call("_start"),
        ],
        [Call(None, libc), Call("__libc_start_main", libc), Call("_start")],
        [Call(None, libc), Call(None, libc)],
    )

    assert {frames(top + base) for base in bases} == {("parse", "libc.so", "main")}
    assert frames([Call(None, libc), Call("_start")]) == ("libc.so",)


def test_base_of_a_thread_in_c_plus_plus_does_not_count_whether_it_has_symbols_or_not() -> None:
    bases = (
        [Call("execute_native_thread_routine", LIBSTDCXX), Call("start_thread", LIBC)],
        [Call(None, LIBSTDCXX), Call(None, LIBC)],
        [Call("execute_native_thread_routine"), Call("start_thread"), Call("clone3")],  # static
    )

    assert {frames([Call("work"), *base]) for base in bases} == {("work",)}
    assert frames([Call(None, LIBSTDCXX), Call("main")]) == ("? in libstdc++.so", "main")


def test_function_that_a_signal_came_to_is_told_if_its_handler_raised_it_again() -> None:
    parse, trampoline = Call("parse", interrupted=True), Call("__restore_rt", LIBC)
    inlined = [Call(name, LIBC, interrupted=True) for name in ("tgkill", "pthread_kill")]
    bug = [trampoline, parse, Call("main")]
    raised = [*inlined, Call("raise", LIBC), Call("on_crash")]
    bare = [Call(None, LIBC, interrupted=True), Call("raise", LIBC), Call("on_crash")]
    once_more = [trampoline, Call("raise", LIBC, interrupted=True), Call("on_crash")]
    twice = [*inlined, Call("another"), *once_more]
    aborted = [*inlined, Call("abort", LIBC), Call("on_timer")]

    for top in (raised, bare, twice):
        assert frames([*top, *bug]) == ("parse", "main")
    assert frames([*aborted, *bug]) == ("on_timer", "libc.so", "parse", "main")
    assert frames([*inlined, Call("raise", LIBC), Call("check")]) == ("check",)
    assert frames([Call("on_crash"), *bug]) == ("on_crash", "libc.so", "parse", "main")


def test_function_that_a_signal_came_to_is_told_below_the_handler_of_a_runtime() -> None:
    bug = [Call("parse", interrupted=True), Call("main")]
    top = [Call("abort", LIBC), Call("JVM_handle_linux_signal", LIBJVM)]
    symbols = [*top, Call("signalHandler(int)", LIBJVM), Call("__restore_rt", LIBC)]
    none = [*top, Call(None, LIBJVM), Call(None, LIBC)]

    assert frames([*symbols, *bug]) == frames([*none, *bug]) == ("parse", "main")


@pytest.mark.parametrize(
    ("symbols", "none"),
    [
        (
            [("pthread_kill_implementation", LIBC), ("raise", LIBC), ("abort", LIBC)],
            [(None, LIBC), ("raise", LIBC), ("abort", LIBC)],
        ),
        (
            [
                *(("raise", LIBC), ("abort", LIBC)),
                ("__gnu_cxx::__verbose_terminate_handler() [clone .cold]", LIBSTDCXX),
                *(("std::terminate()", LIBSTDCXX), ("__cxa_throw", LIBSTDCXX)),
            ],
            [
                *((None, LIBC), ("raise", LIBC), ("abort", LIBC), (None, LIBSTDCXX)),
                *(("std::terminate()", LIBSTDCXX), ("__cxa_throw", LIBSTDCXX)),
            ],
        ),
        (
            [("raise", LIBC), ("__assert_fail_base", LIBC), ("__assert_fail", LIBC)],
            [("raise", LIBC), (None, LIBC), ("__assert_fail", LIBC)],
        ),
        ([("abort", LIBC)], [("abort", "/lib/ld-musl-x86_64.so.1")]),
        (
            [("abort", LIBC), ("__sanitizer::Die()", LIBASAN), ("__asan_report_load8", LIBASAN)],
            [("abort", LIBC), (None, LIBASAN), ("__asan_report_load8", LIBASAN)],
        ),
        (
            [("__sanitizer::Abort()", "/x/libclang_rt.asan-x86_64.so"), ("abort", LIBC)],
            [(None, "/x/libclang_rt.asan-x86_64.so"), ("abort", LIBC)],
        ),
        (
            [("os::abort(bool)", LIBJVM), ("VMError::report_and_die()", LIBJVM)],
            [(None, LIBJVM), ("JVM_handle_linux_signal", LIBJVM)],
        ),
    ],
)
def test_what_carries_out_an_abort_does_not_count_whether_it_has_symbols_or_not(
    symbols: list[tuple[str | None, str]], none: list[tuple[str | None, str]]
) -> None:
    bug = [Call("parse"), Call("main")]

    for top in (symbols, none):
        assert frames([*(Call(*one) for one in top), *bug]) == ("parse", "main")


@pytest.mark.parametrize(
    "module",
    [
        *(LIBC, "/lib/libc-2.31.so", "/lib/libpthread-2.31.so", "/lib/libm.so.6"),
        *("/lib64/ld-linux-x86-64.so.2", "/lib/ld-2.31.so", "/lib/ld-musl-aarch64.so.1"),
    ],
)
def test_c_library_is_told_as_one(module: str) -> None:
    stack = [Call("less"), Call(None, module), Call("qsort_r", module), Call("main")]

    assert frames([*stack, Call("start_thread", module)]) == ("less", "libc.so", "main")


def test_musl_s_start_does_not_count() -> None:
    bases = (["libc_start_main_stage2", "_start_c"], ["__libc_start_main", "_start"])

    assert {frames([Call("main"), *map(Call, base)]) for base in bases} == {("main",)}


def test_deep_frames_do_not_count() -> None:
    top = [f"f{n}" for n in range(FRAMES)]

    assert of(*top, "from_here") == of(*top, "from_there")


def test_crash_without_a_stack_has_none() -> None:
    assert of() is None
    assert of("_start") is None
    assert of("start") is not None  # anybody's function


def test_abort_alone_is_a_stack() -> None:
    assert frames([Call("raise"), Call("abort"), Call("main")]) == ("main",)
    assert frames([Call("raise"), Call("abort")]) == ("raise", "abort")


@settings(deadline=None)
@given(st.text(max_size=2000))
def test_any_symbol_is_normalised_once_and_for_all(symbol: str) -> None:
    assert normalise(normalise(symbol)) is not None
    assert normalise(symbol) or not symbol  # no two become one by losing all of their names


def test_function_without_a_name_deep_in_a_stack_ties_it_to_no_build() -> None:
    top = [Call(f"f{n}", "/bin/app", f"ab+{n}") for n in range(FRAMES)]

    assert len(frames([*top, Call(None, "/bin/app", "ab+9")])) == FRAMES
    assert len(frames([*top[1:], Call(None, "/bin/app", "ab+9"), *top])) > FRAMES


def test_hostile_symbol_takes_no_long_time() -> None:
    for part in ("<", "(", "<()", ".a", " [clone ", "{lambda", "@", *REPEATED):
        assert isinstance(normalise(part * 1_000_000), str)
        assert isinstance(normalise(part * (LONGEST // len(part) - 1) + "!"), str)


def test_hostile_stack_takes_no_long_time() -> None:
    """The recorder's threads make way for nobody while they look at names."""
    nested = ("()", ("f<", ">"), ("{lambda(", ")}"), ("{lambda", "}"))
    for begin, end in (*nested, *((one, "") for one in REPEATED)):
        deep = MAX_TEXT // len(begin + end) - 5
        names = (f"_R{begin * deep}!{n}!{end * deep}" for n in range(MAX_FRAMES // 4))
        calls = list(map(Call, names))
        began = time.process_time()
        for _ in range(4):  # for the record, the snapshot, …
            frames(calls)
        assert time.process_time() - began < 3
