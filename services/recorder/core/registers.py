"""The registers of the crashing thread, from the first NT_PRSTATUS note of a core.

The order is the kernel's: arch/x86/include/asm/user_64.h and user_32.h (struct
user_regs_struct), arch/arm64/include/uapi/asm/ptrace.h (struct user_pt_regs).
"""

import struct

I386, X86_64, AARCH64 = 3, 62, 183  # e_machine, elf(5)

_NAMES = {
    I386: "ebx ecx edx esi edi ebp eax ds es fs gs orig_eax eip cs eflags esp ss",
    X86_64: "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp"
    " ss fs_base gs_base ds es fs gs",
    AARCH64: " ".join(f"x{number}" for number in range(31)) + " sp pc pstate",
}
_PROGRAM_COUNTER = {I386: "eip", X86_64: "rip", AARCH64: "pc"}
# Where pr_reg begins in struct elf_prstatus, include/linux/elfcore.h.
_OFFSET = {I386: 72, X86_64: 112, AARCH64: 112}


def parse(machine: int, order: str, prstatus: bytes) -> dict[str, int]:
    """Return the registers by name; empty for a machine that is not known, or a short note.

    Args:
        machine: e_machine of the core.
        order: the byte order, as `struct` writes it.
        prstatus: the note's body.
    """
    names = _NAMES.get(machine, "").split()
    layout = struct.Struct(order + ("I" if machine == I386 else "Q") * len(names))
    offset = _OFFSET.get(machine, 0)
    if not names or offset + layout.size > len(prstatus):
        return {}
    return dict(zip(names, layout.unpack_from(prstatus, offset), strict=True))


def program_counter(machine: int, registers: dict[str, int]) -> int | None:
    """Return the address of the instruction that the thread was at, if that is known."""
    return registers.get(_PROGRAM_COUNTER.get(machine, ""))
