"""The worker that makes one backtrace and ends: ``python -I -m services.recorder.unwind_worker``.

A core and the binaries it names are an attacker's input to large C libraries, so whoever takes
over this process shall find nothing: it runs as nobody, without capabilities, network, room to
write or processes to start, within bounds of memory and CPU time. All it reads comes as open
descriptors. Standard input is a `Request`, standard output a `Backtrace`, both as JSON.
"""

import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import drgn

from services.recorder import (
    frame_pointers,
    hardening,
    instruction,
    python_frames,
    python_layouts,
)
from services.recorder.backtrace import (
    MAX_FRAMES,
    MAX_TEXT,
    MAX_THREADS,
    Backtrace,
    Frame,
    Instruction,
    LoadedModule,
    ModuleFile,
    PythonFrame,
    Request,
    Thread,
)

_PYTHON = re.compile(r"python(\d)\.(\d{1,3})[^/]*$")  # python3.11, libpython3.11.so.1.0
_ADDRESS_SPACE = 16 * 1024**3  # bytes; debug information and core are mapped, not read
_DATA = 1024**3  # bytes of memory of its own


def main() -> None:
    """Read the request from standard input and do it."""
    hardening.never_dump_core()
    answer(Request.model_validate_json(sys.stdin.buffer.read()))


def answer(request: Request) -> None:
    """Give up all rights, then unwind, and write the answer to standard output."""
    give_up_rights(request.cpu_seconds)
    try:
        trace = unwind(request)
    except Exception as error:  # noqa: BLE001 - whatever the core made drgn say is the answer
        trace = Backtrace(fault=_short(f"{type(error).__name__}: {error}"))
    trace = trace.model_copy(update={"instruction": _instruction(request)})
    sys.stdout.write(trace.model_dump_json())
    sys.stdout.flush()


def _instruction(request: Request) -> Instruction | None:
    if request.code is None:
        return None
    return instruction.decode(request.machine, request.registers, bytes.fromhex(request.code))


def give_up_rights(cpu_seconds: int) -> None:
    """Become nobody; there is no way back."""
    with suppress(OSError):
        # When memory runs out, take this process and not a service of the host.
        Path("/proc/self/oom_score_adj").write_text("1000")
    hardening.leave_network()
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, _ADDRESS_SPACE),
        (resource.RLIMIT_DATA, _DATA),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    hardening.become_nobody()


def unwind(request: Request) -> Backtrace:
    """Return the backtrace of all threads."""
    program = drgn.Program()
    program.set_enabled_debug_info_finders(["standard"])  # no debuginfod: there is no network
    program.debug_info_options.directories = request.debug_directories
    program.set_core_dump(request.core)
    _load(program, request.modules)
    modules = list(_modules(program, request.modules))
    found = frame_pointers.addresses(program, request.machine, request.registers)
    if found:  # drgn cannot unwind this machine's
        frames = tuple(_plain_frame(program, pc, modules) for pc in found)
        crashed = Thread(tid=request.tid, frames=frames, fault=frame_pointers.NOTE)
        return Backtrace(threads=(crashed,), modules=tuple(modules))
    python = _python(program)
    threads = (
        thread.model_copy(update={"python": python.get(thread.tid, ())})
        for thread in _threads(program, modules, request.frames)
    )
    return Backtrace(threads=tuple(threads), modules=tuple(modules))


def _plain_frame(program: drgn.Program, pc: int, modules: list[LoadedModule]) -> Frame:
    name, offset = None, None
    with suppress(LookupError):
        symbol = program.symbol(pc)
        name, offset = _short(symbol.name), pc - symbol.address
    return Frame(pc=pc, symbol=name or None, offset=offset, module=_module_of(pc, modules))


def _module_of(pc: int, modules: list[LoadedModule]) -> int | None:
    return next((i for i, one in enumerate(modules) if one.start <= pc < one.end), None)


def _python(program: drgn.Program) -> dict[int, tuple[PythonFrame, ...]]:
    """Return the Python frames of each thread, if the process ran a Python that is known."""
    try:
        runtime = program.symbol("_PyRuntime").address
        # Py_Version is in read-only data, which a core does not hold.
        found = _PYTHON.search(program.module(runtime).name)
        version = (int(found[1]), int(found[2])) if found else None
        layout = python_layouts.layout_of(program, runtime, version)
        return python_frames.Interpreter(program, runtime, layout).threads()
    except Exception:  # noqa: BLE001 - none of it is needed, and all of it the process's to forge
        return {}


def _load(program: drgn.Program, files: Iterable[ModuleFile]) -> None:
    """Give each module its file, then look for debug information on this host."""
    for module, _ in program.loaded_modules():
        found = _file_of(module, files)
        if found is not None:
            # drgn compares build IDs. Without one it has to be told: it is what was mapped.
            with suppress(OSError, ValueError, drgn.FaultError):
                module.try_file(found.path, fd=os.dup(found.file), force=module.build_id is None)
    with suppress(drgn.MissingDebugInfoError):
        program.load_default_debug_info()


def _file_of(module: drgn.Module, files: Iterable[ModuleFile]) -> ModuleFile | None:
    bounds = module.address_range
    for file in files:
        if (bounds and file.start <= bounds[0] < file.end) or module.name == file.path:
            return file
    return None


def _modules(program: drgn.Program, files: Iterable[ModuleFile]) -> Iterator[LoadedModule]:
    for module in program.modules():
        bounds = module.address_range
        if not bounds:
            continue
        found = _file_of(module, files)
        yield LoadedModule(
            path=_short(found.path if found else module.name),
            start=bounds[0],
            end=bounds[1],
            build_id=module.build_id.hex() if module.build_id else None,
        )


def _threads(program: drgn.Program, modules: list[LoadedModule], budget: int) -> Iterator[Thread]:
    for count, thread in enumerate(_crashed_first(program)):
        if count == MAX_THREADS or budget <= 0:
            return
        unwound = _thread(thread, modules, min(budget, MAX_FRAMES))
        budget -= len(unwound.frames)
        yield unwound


def _crashed_first(program: drgn.Program) -> Iterator[drgn.Thread]:
    crashed = program.crashed_thread()
    yield crashed
    for thread in sorted(program.threads(), key=lambda one: int(one.tid)):
        if thread.tid != crashed.tid:
            yield thread


def _thread(thread: drgn.Thread, modules: list[LoadedModule], limit: int) -> Thread:
    try:
        trace = thread.stack_trace()
    except (LookupError, ValueError, drgn.FaultError) as error:
        return Thread(tid=thread.tid, fault=_short(str(error)))
    frames = tuple(_frames(trace, modules, limit))
    left_out = len(trace) - limit
    fault = f"{left_out} further frames are left out" if left_out > 0 else None
    return Thread(tid=thread.tid, frames=frames, fault=fault)


def _frames(trace: drgn.StackTrace, modules: list[LoadedModule], limit: int) -> Iterator[Frame]:
    for position, frame in enumerate(trace):
        if position == limit:
            return
        try:
            pc = frame.pc
        except LookupError:
            return  # the outermost frame: nothing called it
        yield _frame(frame, pc, modules)


def _frame(frame: drgn.StackFrame, pc: int, modules: list[LoadedModule]) -> Frame:
    name, offset, source = None, None, None
    with suppress(LookupError):
        symbol = frame.symbol()
        name, offset = symbol.name.partition("@")[0], pc - symbol.address
    with suppress(LookupError):
        location = frame.source()
        source = f"{location[0]}:{location[1]}"
    return Frame(
        pc=pc,
        symbol=_short(frame.function_name or name or "") or None,
        offset=offset if offset is not None and offset >= 0 else None,
        source=source and _short(source),
        module=_module_of(pc, modules),
        inlined=frame.is_inline,
    )


def _short(text: str) -> str:
    return text[:MAX_TEXT].encode("utf-8", "backslashreplace").decode()[:MAX_TEXT]


if __name__ == "__main__":
    main()
