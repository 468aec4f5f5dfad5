"""Signals in words: numbers, names, and what si_code says.

The facts are from signal(7), sigaction(2) and the kernel's include/uapi/asm-generic/siginfo.h.
"""

import signal

# What AppScope's eBPF and library watch, and what else dumps core: signal(7), action "Core".
CRASH_SIGNALS = (
    "SIGSEGV",
    "SIGBUS",
    "SIGILL",
    "SIGFPE",
    "SIGABRT",
    "SIGSYS",
    "SIGTRAP",
    "SIGQUIT",
    "SIGXCPU",
    "SIGXFSZ",
)

_FAULTS = frozenset({"SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP"})

_ANY = {
    0: "sent by a process with kill",
    0x80: "sent by the kernel",
    -1: "queued by a process",
    -2: "a POSIX timer expired",
    -3: "a message queue changed",
    -4: "asynchronous I/O completed",
    -5: "queued SIGIO",
    -6: "sent by a process to one thread",
    -60: "asynchronous name lookup completed",
}

_BY_SIGNAL: dict[str, dict[int, str]] = {
    "SIGSEGV": {
        1: "address not mapped to object",
        2: "invalid permissions for mapped object",
        3: "failed address bound checks",
        4: "access was denied by memory protection keys",
        5: "ADI not enabled for mapped object",
        6: "disrupting MCD error",
        7: "precise MCD exception",
        8: "asynchronous ARM MTE error",
        9: "synchronous ARM MTE exception",
        10: "control protection fault",
    },
    "SIGBUS": {
        1: "invalid address alignment",
        2: "nonexistent physical address",
        3: "object-specific hardware error",
        4: "hardware memory error consumed, action required",
        5: "hardware memory error detected, action optional",
    },
    "SIGILL": {
        1: "illegal opcode",
        2: "illegal operand",
        3: "illegal addressing mode",
        4: "illegal trap",
        5: "privileged opcode",
        6: "privileged register",
        7: "coprocessor error",
        8: "internal stack error",
        9: "unimplemented instruction address",
    },
    "SIGFPE": {
        1: "integer division by zero",
        2: "integer overflow",
        3: "floating-point division by zero",
        4: "floating-point overflow",
        5: "floating-point underflow",
        6: "floating-point inexact result",
        7: "invalid floating-point operation",
        8: "subscript out of range",
        14: "undiagnosed floating-point exception",
    },
    "SIGTRAP": {
        1: "process breakpoint",
        2: "process trace trap",
        3: "process taken branch trap",
        4: "hardware breakpoint or watchpoint",
        5: "undiagnosed trap",
        6: "perf event",
    },
    "SIGSYS": {1: "system call forbidden by a seccomp filter", 2: "system call user dispatch"},
}


def name(number: int) -> str:
    """Return a signal's name, such as SIGSEGV or SIGRTMIN+3; SIG<number> for an unknown one,
    none for 0.
    """
    if not number:
        return "none"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - 34}" if 34 < number < 64 else f"SIG{number}"


def number(signal_name: str) -> int:
    """Return the number of a signal given as SIGSEGV, SEGV or 11.

    Raises:
        ValueError: there is no such signal.
    """
    text = signal_name.strip().upper()
    if text.isdigit() and 1 <= int(text) <= 64:
        return int(text)
    try:
        return signal.Signals[text if text.startswith("SIG") else f"SIG{text}"].value
    except KeyError:
        raise ValueError(f"there is no signal {signal_name!r}") from None


def code_meaning(signal_number: int, code: int) -> str:
    """Return si_code in words, such as ``address not mapped to object``."""
    known = _BY_SIGNAL.get(name(signal_number), {}).get(code) or _ANY.get(code)
    return known or f"unknown code {code}"


def has_fault_address(signal_number: int, code: int) -> bool:
    """Tell whether siginfo holds a fault address: a fault the kernel raised, sigaction(2)."""
    return name(signal_number) in _FAULTS and 0 < code < 0x80


def is_fault(signal_number: int, code: int) -> bool:
    """Tell whether the instruction that the thread was at is what the kernel objected to."""
    return name(signal_number) in _FAULTS and code > 0


def has_sender(code: int) -> bool:
    """Tell whether siginfo holds the PID and UID of a sending process (SI_USER, QUEUE, TKILL)."""
    return code in (0, -1, -6)
