"""The instruction that faulted: what it is in assembly, and what memory it touches.

The bytes are an attacker's, so only the unwinding worker imports this.
"""

from collections.abc import Iterator, Mapping

import capstone
from capstone import arm64_const, x86_const

from services.recorder.core import registers as known
from services.recorder.unwinding.backtrace import Instruction, Touched

_MODES = {
    known.I386: (capstone.CS_ARCH_X86, capstone.CS_MODE_32),
    known.X86_64: (capstone.CS_ARCH_X86, capstone.CS_MODE_64),
    known.AARCH64: (capstone.CS_ARCH_ARM64, capstone.CS_MODE_LITTLE_ENDIAN),
}
_ACCESS = {
    capstone.CS_AC_READ: "read",
    capstone.CS_AC_WRITE: "write",
    capstone.CS_AC_READ | capstone.CS_AC_WRITE: "read and write",
}
# These compute an address, or hint at one, and touch nothing.
_TOUCH_NOTHING = ("lea", "nop", "endbr", "prefetch", "prfm")
_PUSHES, _POPS = ("push", "call", "lcall"), ("pop", "ret", "leave")


def decode(machine: int, registers: Mapping[str, int], code: bytes) -> Instruction | None:
    """Return the instruction at the program counter; None where that is not known.

    Args:
        machine: e_machine of the core.
        registers: of the thread, as `registers.parse` names them.
        code: memory from the program counter on, empty where there is none.
    """
    address = known.program_counter(machine, dict(registers))
    if address is None:
        return None
    disassembler = capstone.Cs(*_MODES[machine])
    disassembler.detail = True
    one = next(disassembler.disasm(code, address, count=1), None)
    if one is None:
        return Instruction(address=address, code=code.hex())
    return Instruction(
        address=address,
        code=bytes(one.bytes).hex(),
        text=f"{one.mnemonic} {one.op_str}".strip(),
        touched=tuple(_touched(machine, one, _Registers(machine, registers, one))),
    )


class _Registers:
    """Values of registers by the numbers and names that the disassembler has for them."""

    def __init__(self, machine: int, registers: Mapping[str, int], one: "capstone.CsInsn") -> None:
        self._registers = registers
        self._one = one
        self.mask = (1 << (32 if machine == known.I386 else 64)) - 1

    def value(self, number: int) -> int | None:
        """Return a register's value; 0 for none, None where it is not known."""
        if number == 0:
            return 0
        name = self._one.reg_name(number)
        if name in ("rip", "eip"):  # counted from the next instruction
            return int(self._one.address) + int(self._one.size)
        if name in ("riz", "eiz", "xzr", "wzr"):
            return 0
        name = {"fp": "x29", "lr": "x30"}.get(name, name)
        if name in self._registers:
            return self._registers[name]
        wide = self._registers.get(_wide(name))
        return None if wide is None else wide & 0xFFFFFFFF

    def known(self, name: str) -> int | None:
        """Return a register's value by the name that `registers.parse` gives it."""
        return self._registers.get(name)

    def segment(self, number: int) -> int | None:
        """Return where a segment begins; only fs and gs begin elsewhere than at 0."""
        name = self._one.reg_name(number) if number else ""
        return self._registers.get(f"{name}_base") if name in ("fs", "gs") else 0


def _wide(name: str) -> str:
    """Return the 64-bit register that a 32-bit one is the lower half of."""
    if name.startswith("w"):
        return f"x{name[1:]}"
    return name[:-1] if name.startswith("r") else f"r{name[1:]}"


def _touched(machine: int, one: "capstone.CsInsn", registers: _Registers) -> Iterator[Touched]:
    if one.mnemonic.startswith(_TOUCH_NOTHING):
        return
    if machine == known.AARCH64:
        yield from _operands_arm64(one, registers)
    else:
        yield from _operands_x86(one, registers)
        yield from _stack_x86(one, registers)


def _operands_x86(one: "capstone.CsInsn", registers: _Registers) -> Iterator[Touched]:
    for operand in one.operands:
        if operand.type != x86_const.X86_OP_MEM:
            continue
        memory = operand.mem
        parts = (
            registers.segment(memory.segment),
            registers.value(memory.base),
            _times(registers.value(memory.index), memory.scale),
        )
        yield from _at(parts, memory.disp, operand.size, operand.access, registers.mask)


def _stack_x86(one: "capstone.CsInsn", registers: _Registers) -> Iterator[Touched]:
    """What goes over the stack without being an operand."""
    pointer = "esp" if registers.mask < 1 << 32 else "rsp"
    size = 4 if pointer == "esp" else 8
    top = registers.known(pointer)
    if top is None:
        return
    name = one.mnemonic.rpartition(" ")[2]
    if name.startswith(_PUSHES):
        yield Touched(access="write", address=(top - size) & registers.mask, size=size)
    elif name.startswith(_POPS) and name != "leave":
        yield Touched(access="read", address=top, size=size)


def _operands_arm64(one: "capstone.CsInsn", registers: _Registers) -> Iterator[Touched]:
    for operand in one.operands:
        if operand.type != arm64_const.ARM64_OP_MEM:
            continue
        index = _times(registers.value(operand.mem.index), 1 << operand.shift.value)
        parts = (registers.value(operand.mem.base), index)
        # Loads and stores are told apart by their names; of size the disassembler says nothing.
        access = capstone.CS_AC_WRITE if one.mnemonic.startswith("st") else capstone.CS_AC_READ
        yield from _at(parts, operand.mem.disp, 0, access, registers.mask)


def _times(value: int | None, factor: int) -> int | None:
    return None if value is None else value * factor


def _at(
    parts: tuple[int | None, ...], displacement: int, size: int, access: int, mask: int
) -> Iterator[Touched]:
    known_parts = [part for part in parts if part is not None]
    if len(known_parts) == len(parts):
        address = (sum(known_parts) + displacement) & mask
        yield Touched(access=_ACCESS.get(access, "read"), address=address, size=size)
