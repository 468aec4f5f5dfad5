"""The README's way to a container's crash in a bucket: its own commands, word for word."""

import re
import shlex
from typing import NamedTuple

from crashbus import Manifest
from crashbus.layout import MANIFEST_NAME
from tests.compose.delivery import WITHIN
from tests.compose.stack import CRASHING, ROOT, Stack
from tests.support import core_pattern
from tests.support.wait import until

_TEXT = (ROOT / "README.md").read_text()
(_BLOCK,) = re.findall(r"^## Or in containers$.*?^```sh\n(.*?)^```$", _TEXT, re.M | re.S)
MAKE_KEYS, START, CRASH, LIST = _BLOCK.splitlines()
STOP = "docker compose down"
assert f"`{STOP}`" in _TEXT
assert CRASHING in CRASH
_PROGRAM = shlex.split(CRASH)[-1]


class Walk(NamedTuple):
    """What was seen on the way.

    Attributes:
        stack: as it runs at its end.
        core_pattern: of the host, before it.
        log: of all services on a host without .env.
        shippers: how many run after the second command.
        in_volume: the crash there.
        listed: what the last command printed.
        in_bucket: the crash in the store.
    """

    stack: Stack
    core_pattern: str
    log: str
    shippers: int
    in_volume: list[Manifest]
    listed: str
    in_bucket: list[Manifest]


async def walk(stack: Stack) -> Walk:
    """First without keys and .env, as the text below the commands says; then all of them."""
    before = core_pattern.current()
    stack.must(START)
    crash(stack)
    in_volume = await until(lambda: crashes(stack.volume()), WITHIN)
    log = stack.logs()

    stack.must(MAKE_KEYS, directory=".")
    stack.must(START)
    shippers = len(stack.containers("shipper"))
    crash(stack)
    in_bucket = await until(lambda: crashes(stack.bucket()), WITHIN)
    return Walk(stack, before, log, shippers, in_volume, stack.must(LIST), in_bucket)


def crashes(files: dict[str, bytes]) -> list[Manifest]:
    """Return the crashes of the README among the files of a destination; there may be others."""
    texts = (content for name, content in files.items() if name.endswith(f"/{MANIFEST_NAME}"))
    found = map(Manifest.model_validate_json, texts)
    ours = (one for one in found if _PROGRAM in one.process.command_line)
    return [one for one in ours if one.process.container]


def crash(stack: Stack) -> None:
    """Crash what the README crashes; it says that it did, docker-run(1)."""
    done = stack.shell(CRASH)
    assert done.returncode == 128 + 11, done.stderr
