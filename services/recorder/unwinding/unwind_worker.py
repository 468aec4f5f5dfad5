"""The worker that makes one backtrace and ends: ``python -I -m …unwind_worker``.

A core and the binaries it names are an attacker's input to large C libraries, so whoever takes
over this process shall find nothing: it runs as nobody, without capabilities, network, room to
write or processes to start, within bounds of memory and CPU time. All it reads comes as open
descriptors. Standard input is a `Request`, standard output a `Backtrace`, both as JSON.
"""

import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import drgn

from services.recorder import hardening
from services.recorder.unwinding import frame_pointers, instruction, python_frames, python_layouts
from services.recorder.unwinding.backtrace import (
    MAX_FRAMES,
    MAX_THREADS,
    Backtrace,
    Instruction,
    LoadedModule,
    ModuleFile,
    PythonFrame,
    Request,
    Stack,
    Thread,
)
from services.recorder.unwinding.module_files import bounds, file_of, with_build_ids
from services.recorder.unwinding.naming import Namer, short

_PYTHON = re.compile(r"python(\d)\.(\d{1,3})[^/]*$")  # python3.11, libpython3.11.so.1.0
_ADDRESS_SPACE = 16 * 1024**3  # bytes; debug information and core are mapped, not read
_DATA = 1024**3  # bytes of memory of its own: what is compressed of debug information goes there


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
        trace = Backtrace(fault=short(f"{type(error).__name__}: {error}"))
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
    files = with_build_ids(request.modules)
    _load(program, files)
    modules = list(_modules(program, files))
    namer = Namer(program, modules, files)
    if request.stacks:  # of a machine whose stacks drgn cannot unwind
        threads = (_walked(program, one, namer) for one in request.stacks)
    else:
        python = _python(program)
        threads = (_thread(one, namer, python) for one in _crashed_first(program))
    return Backtrace(
        threads=tuple(_within(request.frames, islice(threads, MAX_THREADS))), modules=tuple(modules)
    )


def _within(budget: int, threads: Iterable[Thread]) -> Iterator[Thread]:
    """Give threads until they have so many frames together."""
    for thread in threads:
        yield thread.model_copy(update={"frames": thread.frames[:budget]})
        budget -= len(thread.frames)
        if budget <= 0:
            return


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


def _load(program: drgn.Program, files: Sequence[ModuleFile]) -> None:
    """Give each module its file, then look for debug information on this host."""
    for module, _ in program.loaded_modules():
        found = file_of(module, files)
        if found is not None:
            # drgn compares build IDs. Without one it has to be told: it is what was mapped.
            with suppress(OSError, ValueError, drgn.FaultError):
                module.try_file(found.path, fd=os.dup(found.file), force=module.build_id is None)
    with suppress(drgn.MissingDebugInfoError):
        program.load_default_debug_info()
    for module in program.modules():
        if module.debug_file_status is drgn.ModuleFileStatus.WANT_SUPPLEMENTARY:
            _add_supplement(program, module)


def _add_supplement(program: drgn.Program, module: drgn.Module) -> None:
    """Find what a module's debug file refers to by its build ID; drgn has looked by its name."""
    build_id = module.wanted_supplementary_debug_file().checksum.hex()
    for directory in program.debug_info_options.directories:
        with suppress(OSError, ValueError, drgn.FaultError):
            module.try_file(f"{directory}/.build-id/{build_id[:2]}/{build_id[2:]}.debug")
        if module.debug_file_status is drgn.ModuleFileStatus.HAVE:
            return


def _modules(program: drgn.Program, files: Sequence[ModuleFile]) -> Iterator[LoadedModule]:
    for module in program.modules():
        lies = bounds(module)
        if not lies:
            continue
        found = file_of(module, files)
        yield LoadedModule(
            path=short(found.path if found else module.name),
            start=lies[0],
            end=lies[1],
            build_id=module.build_id.hex() if module.build_id else None,
            is_program=isinstance(module, drgn.MainModule),
        )


def _crashed_first(program: drgn.Program) -> Iterator[drgn.Thread]:
    crashed = program.crashed_thread()
    yield crashed
    for thread in sorted(program.threads(), key=lambda one: int(one.tid)):
        if thread.tid != crashed.tid:
            yield thread


def _thread(
    thread: drgn.Thread, namer: Namer, python: Mapping[int, tuple[PythonFrame, ...]]
) -> Thread:
    try:
        trace = thread.stack_trace()
    except (LookupError, ValueError, drgn.FaultError) as error:
        return Thread(tid=thread.tid, fault=short(str(error)))
    frames = tuple(islice(namer.frames(trace), MAX_FRAMES + 1))
    fault = "further frames are left out" if len(frames) > MAX_FRAMES else None
    return Thread(
        tid=thread.tid,
        frames=frames[:MAX_FRAMES],
        python=python.get(thread.tid, ()),
        fault=fault,
    )


def _walked(program: drgn.Program, stack: Stack, namer: Namer) -> Thread:
    frames = tuple(namer.at(frame_pointers.addresses(program, stack)))
    return Thread(tid=stack.tid, frames=frames, fault=frame_pointers.NOTE)


if __name__ == "__main__":
    main()
