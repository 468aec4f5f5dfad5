"""What the unwinding worker is asked and what it answers: validated, because it handles what
an attacker may have written."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from services.recorder.unwinding.fingerprint import Call

MAX_FRAMES = 1024  # of one thread
MAX_THREADS = 4096
MAX_TEXT = 1024  # characters of one name; C++ symbols grow long
MANGLED = ("_Z", "_R")  # how symbols of C++ and of Rust begin

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Address = Annotated[int, Field(ge=0, lt=1 << 64)]


class Part(BaseModel):
    """Base of the parts. Not the one of `crashbus.parts`: that would bring the whole bus into
    every worker, at twice its start-up time."""

    model_config = ConfigDict(frozen=True)


class ModuleFile(Part):
    """An open file of the process, and where it was mapped: from the first place to the last.

    Attributes:
        build_id: found by the worker, because reading what is the process's may take for ever.
    """

    path: str
    start: int
    end: int
    file: int
    build_id: str | None = None


class Stack(Part):
    """Where a thread stood: its program counter and its frame pointer."""

    tid: int
    counter: int
    frame: int


class Request(Part):
    """What to unwind.

    Attributes:
        core: descriptor of the core.
        cpu_seconds: RLIMIT_CPU.
        debug_directories: of separate debug information.
        machine: e_machine of the core; 0: not known.
        registers: the crashing thread's.
        stacks: of all threads, if frame pointers are all there is to find frames by.
        code: memory from the program counter on, as hexadecimal digits; None: was no fault.
        frames: the most to be returned for all threads together.
    """

    core: int
    modules: tuple[ModuleFile, ...] = ()
    cpu_seconds: int = Field(gt=0)
    machine: int = 0
    registers: dict[str, int] = Field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    code: str | None = None
    debug_directories: tuple[str, ...] = ("/usr/lib/debug",)
    frames: int = Field(20_000, gt=0)


class Frame(Part):
    """One function on a stack.

    Attributes:
        readable: the symbol as the source has it, where it is mangled.
        offset: from the beginning of the symbol, in bytes.
        source: ``file:line``, where debug information tells.
        module: index into the backtrace's modules.
        inlined: this function has no code of its own at this place.
        interrupted: a signal came while it was at work.
    """

    pc: Address
    symbol: Text | None = None
    readable: Text | None = None
    offset: Address | None = None
    source: Text | None = None
    module: int | None = Field(None, ge=0)
    inlined: bool = False
    interrupted: bool = False

    @property
    def is_mangled(self) -> bool:
        """Whether the symbol is one of C++ or Rust, with class, namespace or crate in it."""
        return self.symbol is not None and self.symbol.startswith(MANGLED)


class PythonFrame(Part):
    """One Python function on a stack."""

    function: Text
    file: Text
    line: int | None = None


class Thread(Part):
    """One thread's stack, innermost frame first.

    Attributes:
        python: its Python functions, if it ran any.
        fault: why there are no frames, or not all.
    """

    tid: int = Field(ge=0)
    frames: tuple[Frame, ...] = Field((), max_length=MAX_FRAMES)
    python: tuple[PythonFrame, ...] = Field((), max_length=MAX_FRAMES)
    fault: Text | None = None


class LoadedModule(Part):
    """A program or library that was mapped.

    Attributes:
        is_program: it was started; all else is a library of it.
    """

    path: Text
    start: Address
    end: Address
    build_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{0,128}$")] | None = None
    is_program: bool = False

    def place(self, pc: int) -> str | None:
        """Return where an address is in a program, the same on each host that runs this build.

        Of a program without a build ID it may be the same in another build, too.
        """
        return f"{self.build_id or ''}+{pc - self.start:x}" if self.is_program else None


class Touched(Part):
    """Memory that an instruction reads or writes.

    Attributes:
        size: bytes; 0 where the disassembler does not tell.
    """

    access: Literal["read", "write", "read and write"]
    address: Address
    size: int = Field(ge=0)


class Instruction(Part):
    """The instruction that faulted.

    Attributes:
        code: its bytes as hexadecimal digits; empty: there is no memory at its address.
        text: assembly; None: these bytes are no instruction.
    """

    address: Address
    code: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{0,64}$")] = ""
    text: Text | None = None
    touched: tuple[Touched, ...] = Field((), max_length=8)


class Backtrace(Part):
    """All threads, the crashing one first.

    Attributes:
        instruction: what the crashing thread was at, if it was a fault.
        fault: why there is none; then all else is empty.
    """

    threads: tuple[Thread, ...] = Field((), max_length=MAX_THREADS)
    modules: tuple[LoadedModule, ...] = ()
    instruction: Instruction | None = None
    fault: Text | None = None

    def calls(self) -> tuple[Call, ...]:
        """Return the crashing thread's frames for the fingerprint."""
        frames = self.threads[0].frames if self.threads else ()
        # What is inlined there has a name that lacks class and namespace, even in main.
        nameless = {frame.module for frame in frames if frame.is_mangled}
        told = (one for one in frames if not (one.inlined and one.module in nameless))
        return tuple(map(self._call, told))

    def _call(self, frame: Frame) -> Call:
        name, module = frame.readable or frame.symbol, self._module_of(frame)
        path, place = (module.path, module.place(frame.pc)) if module else (None, None)
        return Call(name, path, place, frame.interrupted)

    def _module_of(self, frame: Frame) -> LoadedModule | None:
        if frame.module is None or frame.module >= len(self.modules):
            return None
        return self.modules[frame.module]
