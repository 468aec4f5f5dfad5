"""The faulting instruction: what it is, and what memory it touches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.recorder.core import registers
from services.recorder.core.registers import AARCH64, I386, X86_64
from services.recorder.unwinding import instruction

_X86 = {"rip": 0x1000, "rdi": 0x1234, "rsi": 3, "rsp": 0x7000, "rax": (7 << 32) + 1, "rcx": 5}
_X86 |= {"fs_base": 0x9000, "r8": 0x100}
_ARM = {"pc": 0x1000, "x0": 0x10, "x1": 2, "x29": 3, "x30": 4, "sp": 0x7000}
_OLD = {"eip": 0x1000, "eax": 0x10, "esp": 0x7000}


@pytest.mark.parametrize(
    ("machine", "values", "code", "text", "touched"),
    [
        (X86_64, _X86, "8b04b7", "mov eax, dword ptr [rdi + rsi*4]", [("read", 0x1240, 4)]),
        (X86_64, _X86, "8808", "mov byte ptr [rax], cl", [("write", (7 << 32) + 1, 1)]),
        (X86_64, _X86, "678b00", "mov eax, dword ptr [eax]", [("read", 1, 4)]),
        (X86_64, _X86, "67418b00", "mov eax, dword ptr [r8d]", [("read", 0x100, 4)]),
        (
            *(X86_64, _X86, "64488b042528000000", "mov rax, qword ptr fs:[0x28]"),
            [("read", 0x9028, 8)],
        ),
        (
            *(X86_64, _X86, "488b0510000000", "mov rax, qword ptr [rip + 0x10]"),
            [("read", 0x1017, 8)],
        ),
        (
            *(X86_64, _X86, "f3a4", "rep movsb byte ptr [rdi], byte ptr [rsi]"),
            [("write", 0x1234, 1), ("read", 3, 1)],
        ),
        (X86_64, _X86, "488d0510000000", "lea rax, [rip + 0x10]", []),
        (X86_64, _X86, "e800000000", "call 0x1005", [("write", 0x6FF8, 8)]),
        (X86_64, _X86, "c3", "ret", [("read", 0x7000, 8)]),
        (X86_64, _X86, "0f0b", "ud2", []),
        (X86_64, _X86, "488b03", "mov rax, qword ptr [rbx]", []),  # rbx is not known
        (X86_64, _X86, "ff", None, []),
        (X86_64, _X86, "", None, []),
        (I386, _OLD, "8b4004", "mov eax, dword ptr [eax + 4]", [("read", 0x14, 4)]),
        (I386, _OLD, "50", "push eax", [("write", 0x6FFC, 4)]),
        (AARCH64, _ARM, "007861f8", "ldr x0, [x0, x1, lsl #3]", [("read", 0x20, 0)]),
        (AARCH64, _ARM, "fd7bbfa9", "stp x29, x30, [sp, #-0x10]!", [("write", 0x6FF0, 0)]),
        (AARCH64, _ARM, "a00340f9", "ldr x0, [x29]", [("read", 3, 0)]),
    ],
)
def test_instruction(
    machine: int,
    values: dict[str, int],
    code: str,
    text: str | None,
    touched: list[tuple[str, int, int]],
) -> None:
    found = instruction.decode(machine, values, bytes.fromhex(code))

    assert found is not None
    assert (found.address, found.text) == (0x1000, text)
    assert [(one.access, one.address, one.size) for one in found.touched] == touched


def test_unknown_machine_has_none() -> None:
    assert instruction.decode(8, {"pc": 1}, b"\x90") is None
    assert registers.parse(8, "<", bytes(400)) == {}


@given(
    st.sampled_from([I386, X86_64, AARCH64]),
    st.binary(max_size=15),
    st.integers(0, 2**64 - 1),
)
def test_any_bytes_are_an_instruction_or_none(machine: int, code: bytes, value: int) -> None:
    value &= 0xFFFFFFFF if machine == I386 else 2**64 - 1
    size = 17 * 4 if machine == I386 else 34 * 8
    note = value.to_bytes(8, "little") * (size // 8 + 20)
    values = registers.parse(machine, "<", note)

    assert instruction.decode(machine, values, code) is not None


def test_short_note_has_no_registers() -> None:
    assert registers.parse(X86_64, "<", bytes(112 + 27 * 8 - 1)) == {}
    assert len(registers.parse(X86_64, "<", bytes(112 + 27 * 8))) == 27
