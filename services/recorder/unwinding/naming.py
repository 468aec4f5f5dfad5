"""The frames that drgn finds, with names, files and modules."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import drgn

from services.recorder.unwinding.backtrace import MANGLED, MAX_TEXT, Frame, LoadedModule, ModuleFile
from services.recorder.unwinding.demangling import Demangler
from services.recorder.unwinding.frame_pointers import across_stacks
from services.recorder.unwinding.go_names import GoNames
from services.recorder.unwinding.go_table import Function

_TRAMPOLINES = ("__restore_rt", "__kernel_rt_sigreturn", "runtime.sigreturn")
_GO_FAULT = "runtime.sigpanic"
_GO_SWITCHES = ("runtime.systemstack", "runtime.morestack")  # to a stack of its own
_FRAME_POINTERS = ("rbp", "x29")


class Namer:
    """Names frames of one program.

    Args:
        modules: those that the answer tells of.
        files: those that the process had mapped.
    """

    def __init__(
        self,
        program: drgn.Program,
        modules: Sequence[LoadedModule],
        files: Sequence[ModuleFile] = (),
    ) -> None:
        self._program = program
        self._modules = modules
        self._go = GoNames(program, files)
        self._demangler = Demangler()

    def frames(self, trace: drgn.StackTrace) -> Iterator[Frame]:
        """Give the frames of a stack, innermost first, up to where it ends.

        Where nothing tells how a function keeps its caller's registers, drgn follows the frame
        pointer. If that is an older one, frames come once more, and are left out here.
        """
        seen = set()
        called: str | None = None
        caller: int | None = None
        for position, frame in enumerate(trace):
            try:
                place = frame.pc, frame.sp
            except LookupError:
                return  # the outermost frame: nothing called it
            if position and not frame.pc:
                return  # nor is there a function at 0 that called anything
            if place not in seen:
                if caller and caller != frame.pc and (between := self._go.find(caller - 1)):
                    yield self._go_frame(caller, between)
                symbol = _symbol_of(frame)
                go = None if symbol or frame.function_name else self._go_function(frame, called)
                caller = self._go_caller(frame, called, go) if go else None
                named = self._go_frame(frame.pc, go) if go else self._frame(frame, symbol, called)
                called = named.symbol
                yield named.model_copy(update={"interrupted": frame.interrupted})
                if called and called.removesuffix(".abi0") in _GO_SWITCHES:
                    yield from self._left_by_go(frame)
                    return
            if not frame.is_inline:
                seen.add(place)

    def _left_by_go(self, frame: drgn.StackFrame) -> Iterator[Frame]:
        """Give the frames of the stack that Go's runtime left to do something on its own.

        What else lies on its own looks like frames, or the stack ends there. The chain of frame
        pointers leads back; with Go's debug information, which tells nothing of it, from the
        innermost frame on.
        """
        counters = list(across_stacks(self._program, _frame_pointer(frame)))
        if frame.pc in counters:
            counters = counters[counters.index(frame.pc) + 1 :]
        for pc in counters:
            found = self._plain(pc, pc - 1)
            go = None if found.symbol else self._go.find(pc - 1)
            yield self._go_frame(pc, go) if go else found

    def at(self, counters: Iterable[int]) -> Iterator[Frame]:
        """Give the frames of program counters, innermost first.

        Here drgn names no inlined function; the line is that of the innermost.
        """
        for position, pc in enumerate(counters):
            # A return address may already be the next function's.
            yield self._plain(pc, pc - 1 if position else pc)

    def _frame(
        self, frame: drgn.StackFrame, symbol: drgn.Symbol | None, called: str | None
    ) -> Frame:
        source, name, offset = None, frame.function_name, None
        if symbol is None and not name and self._is_begun(frame.pc, called):
            return self._plain(frame.pc, frame.pc)
        if symbol is not None:
            offset = frame.pc - symbol.address
            plain = symbol.name.partition("@")[0]
            # What was inlined has no symbol of its own. The name alone lacks class and namespace.
            if not name or (plain.startswith(MANGLED) and not frame.is_inline):
                name = plain
        with suppress(LookupError):
            location = frame.source()
            source = f"{location[0]}:{location[1]}"
        return self._made(frame.pc, name, offset, source, frame.is_inline)

    def _go_function(self, frame: drgn.StackFrame, called: str | None) -> Function | None:
        """Return the Go function of a frame."""
        return self._go.find(frame.pc if self._is_exact(frame, called) else frame.pc - 1)

    def _is_exact(self, frame: drgn.StackFrame, called: str | None) -> bool:
        """Tell whether a Go function stands at the program counter, for nothing was called there.

        A return address is behind a call, and may already be the next function's.
        """
        if frame.interrupted or called == _GO_FAULT:
            return True
        found = self._go.find(frame.pc)
        return found is not None and found.entry == frame.pc and _is_trampoline(found.name)

    def _go_caller(
        self, frame: drgn.StackFrame, called: str | None, function: Function
    ) -> int | None:
        """Return to where a Go function returns whose frame tells nothing of it.

        Without debug information drgn follows frame pointers, and a function that calls none sets
        up none: its caller would be missing. Only x86-64 has the address there: elsewhere a call
        leaves it in a register.
        """
        size, platform = function.stack, self._program.platform
        if platform is None or platform.arch != drgn.Architecture.X86_64:
            return None
        if size is None or size < 0 or not self._is_exact(frame, called):
            return None
        with suppress(LookupError, drgn.FaultError, OverflowError):
            return int(self._program.read_u64(frame.sp + size))
        return None

    def _go_frame(self, pc: int, function: Function) -> Frame:
        offset = pc - function.entry
        return self._made(pc, function.name, offset, function.source, inlined=False)

    def _is_begun(self, pc: int, called: str | None) -> bool:
        """Tell whether a return address is the beginning of the function that it is in.

        drgn looks before it, where the call was. There was none where the address was put there by
        hand, for a signal handler to return to, or as Go makes a fault look like a call. Elsewhere
        the call was the last instruction of the function before.
        """
        with suppress(LookupError):
            found = self._program.symbol(pc)
            by_hand = called == _GO_FAULT or _is_trampoline(found.name)
            return by_hand and bool(found.address == pc)
        return False

    def _plain(self, pc: int, inside: int) -> Frame:
        """Return the frame of a program counter by what is at an address."""
        name, offset, source = None, None, None
        with suppress(LookupError):
            symbol = self._program.symbol(inside)
            name, offset = symbol.name.partition("@")[0], pc - symbol.address
        with suppress(LookupError):
            location = self._program.source_location(inside)[0]
            source = f"{location.filename}:{location.line}"
        return self._made(pc, name, offset, source, inlined=False)

    def _made(
        self, pc: int, name: str | None, offset: int | None, source: str | None, inlined: bool
    ) -> Frame:
        readable = self._demangler.readable(name) if name else None
        return Frame(
            pc=pc,
            symbol=short(name or "") or None,
            readable=readable and short(readable),
            offset=offset if offset is not None and offset >= 0 else None,
            source=source and short(source),
            module=self._module_of(pc),
            inlined=inlined,
        )

    def _module_of(self, pc: int) -> int | None:
        found = (i for i, one in enumerate(self._modules) if one.start <= pc < one.end)
        return next(found, None)


def _symbol_of(frame: drgn.StackFrame) -> drgn.Symbol | None:
    with suppress(LookupError):
        return frame.symbol()
    return None


def _frame_pointer(frame: drgn.StackFrame) -> int:
    for name in _FRAME_POINTERS:
        with suppress(LookupError, ValueError):
            return int(frame.register(name))
    return 0


def _is_trampoline(name: str) -> bool:
    return name.startswith(_TRAMPOLINES)


def short(text: str) -> str:
    """Return text as an answer may hold it."""
    return text[:MAX_TEXT].encode("utf-8", "backslashreplace").decode()[:MAX_TEXT]
