"""The frames that drgn finds, with names, files and modules."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import drgn

from services.recorder.backtrace import MANGLED, MAX_TEXT, Frame, LoadedModule
from services.recorder.demangling import Demangler

_TRAMPOLINES = ("__restore_rt", "__kernel_rt_sigreturn", "runtime.sigreturn")
_GO_FAULT = "runtime.sigpanic"


class Namer:
    """Names frames of one program."""

    def __init__(self, program: drgn.Program, modules: Sequence[LoadedModule]) -> None:
        self._program = program
        self._modules = modules
        self._demangler = Demangler()

    def frames(self, trace: drgn.StackTrace) -> Iterator[Frame]:
        """Give the frames of a stack, innermost first, up to where it ends.

        Where nothing tells how a function keeps its caller's registers, drgn follows the frame
        pointer. If that is an older one, frames come once more, and are left out here.
        """
        seen = set()
        called: str | None = None
        for position, frame in enumerate(trace):
            try:
                place = frame.pc, frame.sp
            except LookupError:
                return  # the outermost frame: nothing called it
            if position and not frame.pc:
                return  # nor is there a function at 0 that called anything
            if place not in seen:
                named = self._frame(frame, called)
                called = named.symbol
                yield named
            if not frame.is_inline:
                seen.add(place)

    def at(self, counters: Iterable[int]) -> Iterator[Frame]:
        """Give the frames of program counters, innermost first.

        Here drgn names no inlined function; the line is that of the innermost.
        """
        for position, pc in enumerate(counters):
            # A return address may already be the next function's.
            yield self._plain(pc, pc - 1 if position else pc)

    def _frame(self, frame: drgn.StackFrame, called: str | None) -> Frame:
        symbol, source, name, offset = None, None, frame.function_name, None
        with suppress(LookupError):
            symbol = frame.symbol()
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

    def _is_begun(self, pc: int, called: str | None) -> bool:
        """Tell whether a return address is the beginning of the function that it is in.

        drgn looks before it, where the call was. There was none where the address was put there by
        hand, for a signal handler to return to, or as Go makes a fault look like a call. Elsewhere
        the call was the last instruction of the function before.
        """
        with suppress(LookupError):
            found = self._program.symbol(pc)
            by_hand = called == _GO_FAULT or found.name.startswith(_TRAMPOLINES)
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


def short(text: str) -> str:
    """Return text as an answer may hold it."""
    return text[:MAX_TEXT].encode("utf-8", "backslashreplace").decode()[:MAX_TEXT]
