"""The pipe helper under hostile input, built so that any stray access or overflow ends it.

The kernel starts it as root for every crash. What it is given is made here, not by crashes: its
arguments, what a recorder says, rules, and cores.
"""

import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.requirements import lacking, need_program, need_root

SOURCES = Path(__file__).parents[2] / "services/recorder/helper"
WITHIN = 60  # seconds for a run; the machine may be busy
SANITIZED = (
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-pthread"),
    *("-Wall", "-Wextra", "-Werror"),
)
# What it leaves to the end of the process is no leak.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:exitcode=99", "UBSAN_OPTIONS": "exitcode=99"}


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_program("gcc")
    program = tmp_path_factory.mktemp("helper") / "corepipe"
    sources = [str(one) for one in sorted(SOURCES.glob("*.c"))]
    subprocess.run(["gcc", *SANITIZED, "-o", str(program), *sources], check=True)
    return program


@pytest.fixture
def orphans(helper: Path, tmp_path: Path) -> Iterator[Path]:
    """Where it keeps crashes; its rules say so."""
    directory = tmp_path / "orphans"
    directory.mkdir(mode=0o700)
    rules(helper, directory)
    yield directory
    (helper.parent / "rules").unlink()


def rules(helper: Path, orphans: Path, /, *more: str, **other: str | None) -> None:
    """Leave rules beside the helper.

    Args:
        other: values unlike those that a recorder leaves; None: that rule is missing.
    """
    usual = {"directory": str(orphans), "limit": "0", "reserve": "0", "most": "1000"}
    general = usual | {"seconds": f"{WITHIN}"} | other
    lines = [f"{key} {value}" for key, value in general.items() if value is not None]
    (helper.parent / "rules").write_bytes(os.fsencode("\n".join((*lines, *more, ""))))


def run(helper: Path, *arguments: str | bytes, core: bytes = b"") -> int:
    """Run it as the kernel does, and return its exit status."""
    done = subprocess.run(
        [helper, *arguments], input=core, env=ENVIRONMENT, capture_output=True, timeout=WITHIN * 2
    )
    assert b"Sanitizer" not in done.stderr, done.stderr.decode(errors="replace")
    assert b"runtime error" not in done.stderr, done.stderr.decode(errors="replace")
    assert done.returncode in (0, 1), done
    return done.returncode


def me(path: str = "/nobody/listens") -> tuple[str, ...]:
    """Return arguments that name a process of this host: this one."""
    return path, str(os.getpid()), str(threading.get_native_id()), "11", str(int(time.time()))


@contextmanager
def recorder(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """Take one crash as a recorder does, then do what `answer` does."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.send(b".!")  # greeted, and its turn has come
            _, descriptors, *_ = socket.recv_fds(connection, 4096, 4)
            for one in descriptors:
                os.close(one)
            answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join(WITHIN)
        server.close()
        path.unlink()
    assert not thread.is_alive()


def test_too_few_or_too_long_arguments_are_refused(helper: Path) -> None:
    given = me()
    for count in range(len(given)):
        assert run(helper, *given[:count]) == 1
    for place in range(len(given)):
        arguments = list(given)
        arguments[place] = "x" * 100_000
        assert run(helper, *arguments) == 1
    assert run(helper, *("%s%n%99999d" for _ in given)) == 1
    assert run(helper, "/s", "../../etc", "..", "%n", "\x1b]0;x\x07") == 1


def test_what_it_is_told_of_a_process_leads_nowhere_else(helper: Path, orphans: Path) -> None:
    path, pid, tid, number, moment = me()
    assert run(helper, path, pid, tid, number, "../escaped") == 1
    assert run(helper, path, "self", tid, number, moment) == 1
    assert run(helper, path, pid, f"self/task/{tid}", number, moment) == 1
    assert run(helper, path, "999999999", tid, number, moment) == 1
    assert run(helper, path, pid, tid, number, "") == 1
    assert [one.name for one in orphans.parent.iterdir()] == ["orphans"]
    assert list(orphans.iterdir()) == []


def elf(headers: int, *entries: tuple[int, int, int]) -> bytes:
    """Return an ELF header that announces some program headers, and these of them.

    Args:
        entries: type, offset and size in the file of each.
    """
    sizes = (64, 56, headers, 0, 0, 0)
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, *sizes)
    return head + b"".join(
        struct.pack("<IIQQQQQQ", kind, 4, offset, 0, 0, size, size, 4096)
        for kind, offset, size in entries
    )


PT_LOAD = 1
CORES = {
    "empty": b"",
    "one byte": b"\x7f",
    "a head that is cut": elf(1)[:63],
    "more headers than bytes": elf(0xFFFE, (PT_LOAD, 0, 1)),
    "an odd number of headers": elf(0xFFFF, (PT_LOAD, 0, 1)),
    "memory beyond the end": elf(1, (PT_LOAD, 2**64 - 1, 1)),
    "memory before the head": elf(1, (PT_LOAD, 0, 1)),
    "headers at the last address": elf(1)[:32] + struct.pack("<Q", 2**64 - 8) + elf(1)[40:],
    "zeros": bytes(3 * 1024 * 1024 + 1),
}


@pytest.mark.parametrize("head_only", [False, True], ids=["whole", "no memory"])
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_odd_cores_are_kept_as_they_come(
    helper: Path, orphans: Path, core: bytes, head_only: bool
) -> None:
    rules(helper, orphans, *(["off user x", "nonsense"] if head_only else []))
    assert run(helper, *me(), core=core) == 0
    (kept,) = orphans.iterdir()
    told = (kept / "end").read_text()
    if head_only:
        assert told == "no memory may be kept" or not core
        assert core.startswith((kept / "core").read_bytes())
    else:
        assert (told, (kept / "core").read_bytes()) == ("", core)


@contextmanager
def kernel_log() -> Iterator[Callable[[], str]]:
    """Give what reads the kernel's log from now on."""
    try:
        log = os.open("/dev/kmsg", os.O_RDWR | os.O_NONBLOCK)  # the helper writes to it
    except OSError as error:
        lacking(f"needs the kernel's log: {error}")
    os.lseek(log, 0, os.SEEK_END)

    def read() -> str:
        lines = []
        while True:
            try:
                lines.append(os.read(log, 8192).decode(errors="replace"))
            except BrokenPipeError:
                continue  # the oldest were overwritten; the next one is read then
            except BlockingIOError:
                return "".join(lines)

    try:
        yield read
    finally:
        os.close(log)


NO_NUMBERS = ("", " ", "5 ", " 5", "+5", "-1", "5s", "0x5", "5 5", "9" * 19, "1" + "0" * 19)
WRONG = [
    *(("seconds", value) for value in (*NO_NUMBERS, "0", "61", None)),
    *(("most", value) for value in (*NO_NUMBERS, None)),
    *(("reserve", value) for value in (*NO_NUMBERS, "1001", None)),
    *(("limit", value) for value in (*NO_NUMBERS, None)),
    *(("directory", value) for value in ("", "orphans", None)),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_rule_is_refused_and_named(
    helper: Path, orphans: Path, key: str, value: str | None
) -> None:
    need_root()  # for the kernel's log
    rules(helper, orphans, **{key: value})

    with kernel_log() as log:
        assert run(helper, *me(), core=b"core") == 1
        said = log()

    named = f"crash of PID {os.getpid()} not captured: the recorder took nothing, and the rules"
    assert f"{named} are wrong at '{key}': Invalid argument" in said
    assert not list(orphans.iterdir())


@pytest.mark.parametrize("key", ["directory", "limit", "reserve", "most", "seconds", "handler"])
def test_rule_that_is_there_twice_is_refused(helper: Path, orphans: Path, key: str) -> None:
    again = {"directory": str(orphans), "handler": "5 /bin/true % %"}.get(key, "5")
    rules(helper, orphans, f"{key} {again}", **({"handler": again} if key == "handler" else {}))

    assert run(helper, *me(), core=b"core") == 1
    assert not list(orphans.iterdir())


def test_rule_is_where_a_line_begins_and_nowhere_else(helper: Path, orphans: Path) -> None:
    place = orphans / "seconds 0"
    place.mkdir(mode=0o700)
    rules(helper, place)

    assert run(helper, *me(), core=b"core") == 0
    (kept,) = place.iterdir()
    assert ((kept / "core").read_bytes(), (kept / "end").read_text()) == (b"core", "")


def others_may_write(file: Path) -> None:
    file.chmod(0o602)


def another_owns(file: Path) -> None:
    os.chown(file, 65534, -1)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def link(file: Path) -> None:
    file.symlink_to(file.rename(file.with_name("elsewhere")))


def cut_by_a_nul(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0\noff everyone\n")


def too_long(file: Path) -> None:
    file.write_bytes(file.read_bytes().ljust(64 * 1024, b"\n"))


@pytest.mark.parametrize(
    "meddle", [others_may_write, another_owns, pipe, link, cut_by_a_nul, too_long]
)
def test_rules_that_are_not_the_recorders_are_not_believed(
    helper: Path, orphans: Path, meddle: Callable[[Path], None]
) -> None:
    need_root()
    meddle(helper.parent / "rules")

    assert run(helper, *me(), core=b"core") == 1
    assert not list(orphans.iterdir())


def test_of_more_rules_than_can_be_heeded_no_memory_is_kept(helper: Path, orphans: Path) -> None:
    rules(helper, orphans, *["off comm x"] * 1024)
    assert run(helper, *me(), core=b"core") == 0
    rules(helper, orphans, *["off comm x"] * 1025)
    path, pid, tid, number, _ = me()
    assert run(helper, path, pid, tid, number, "7", core=b"core") == 0

    assert {(one / "end").read_text() for one in orphans.iterdir()} == {"", "no memory may be kept"}


KEYS = (
    *("limit", "reserve", "most", "handler", "off", "off executable", "off argument", "off user"),
    *("off container", ""),
)
VALUES = ("", "[", "*" * 30 + "x", "f" * 70, "-1", "9" * 40, " ", "%n")


def test_random_cores_and_rules_leave_it_standing(helper: Path, orphans: Path) -> None:
    chance = random.Random(28)
    for _ in range(25):
        core = bytearray(elf(3, *[(PT_LOAD, chance.randrange(400), 64)] * 3))
        core += chance.randbytes(chance.randrange(4000))
        for _ in range(chance.randrange(6)):
            core[chance.randrange(len(core))] = chance.randrange(256)
        count = chance.randrange(8)
        odd = [f"{chance.choice(KEYS)} {chance.choice(VALUES)}" for _ in range(count)]
        rules(helper, orphans, *odd)
        run(helper, *me(), core=bytes(core))


ORDERS = (
    *(b"", b"\0", b"5", b"5\0", b"5\0/bin/true", b"5\0/bin/true\0%\0", b"x" * 600),
    *(b"5\0/bin/true\0%\0%\0%\0", b"5\0" + b"x\0" * 200, b"5\0/no/such\0%\0%\0"),
    *(seconds + b"\0/bin/true\0%\0%\0" for seconds in (b"5", b"2147484", b"9" * 20)),
    *(seconds + b"\0/bin/sleep\0%\0%\0" for seconds in (b"-5", b"0", b"", b"-" + b"9" * 20)),
)


def test_orders_of_any_kind_leave_it_standing_and_held_for_no_longer(
    helper: Path, tmp_path: Path
) -> None:
    chance = random.Random(28)
    null = os.open("/dev/null", os.O_RDONLY)
    made = [bytes(chance.choices(b"5\0%x/", k=chance.randrange(600))) for _ in range(25)]
    answers: list[bytes] = []

    def answer(connection: socket.socket, order: bytes) -> None:
        if order:
            socket.send_fds(connection, [order], [null])
        connection.shutdown(socket.SHUT_WR)
        answers.append(connection.recv(64))

    for order in (*ORDERS, *made):
        with recorder(tmp_path / "s", partial(answer, order=order)):
            assert run(helper, *me(str(tmp_path / "s")), "+", f"{WITHIN * 3}", "0") == 0
    os.close(null)
    for order, said in zip(ORDERS, answers, strict=False):
        if b"/bin/sleep" in order:
            assert said == b"deadline\n", order
        elif order.endswith(b"/bin/true\0%\0%\0"):
            assert said == b"exit 0\n", order
        else:
            assert said.startswith(b"error ") or not said, order


HANDLERS = {
    **dict.fromkeys(("", "5", "5 ", " ", "5 /bin/true", "5 /bin/true %", "x" * 600), 1),
    **dict.fromkeys(("5 /bin/true % % %", "5 " + "x " * 200, "5 /no/such % %", "5  % %"), 1),
    **dict.fromkeys((f"{seconds} /bin/sleep % %" for seconds in ("-5", "0", "-" + "9" * 20)), 1),
    **dict.fromkeys((f"{seconds} /bin/true % %" for seconds in ("5", "2147484", "9" * 20)), 0),
}


def test_handlers_of_any_kind_leave_it_standing_and_held_for_no_longer(
    helper: Path, orphans: Path
) -> None:
    path, pid, tid, number, _ = me()
    for moment, (handler, status) in enumerate(HANDLERS.items()):
        rules(helper, orphans, f"handler {handler}")
        given = path, pid, tid, number, str(moment)
        assert run(helper, *given, "+", f"{WITHIN * 3}", "0", core=b"core") == status, handler
        assert (orphans / f"{moment}-{pid}" / "core").read_bytes() == b"core"
