"""What the pipe helper may keep when no recorder takes a crash: the file ``rules`` beside it.

The helper is a small C program, so its rules are lines of ``<key> <value>``. A number or the
directory that is wrong, missing or there twice, and a second handler, make it refuse the whole
crash. What else it does not understand it takes for a word against keeping any memory;
services/recorder/helper/orphan.c.
"""

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

from crashbus import layout
from services.recorder.core.core_policy import Rule
from services.recorder.errors import RecorderError
from services.recorder.handover.chain import Handler
from services.recorder.settings import RecorderSettings

NAME = "rules"
MOST = 64  # crashes kept; of more the helper tells in the kernel's log
_MAX_BYTES = 64 * 1024 - 1  # less than RULES of orphan.c
_WITHIN = 60  # seconds for which the helper holds a process at most


def encoded(spool: Path, settings: RecorderSettings, handler: Handler | None = None) -> bytes:
    """Return the file's content; arguments as for `text`.

    Raises:
        RecorderError: the helper would not read so much.
    """
    rules = os.fsencode(text(spool, settings, handler))
    if len(rules) > _MAX_BYTES:
        raise RecorderError(
            f"the pipe helper's rules have {len(rules)} bytes, and may have {_MAX_BYTES}: "
            "shorten CRASHBUS_RECORDER_CORE_OFF"
        )
    return rules


def text(spool: Path, settings: RecorderSettings, handler: Handler | None = None) -> str:
    """Return the rules that these settings make.

    Args:
        spool: without symbolic links.
        handler: gets each such crash, too.
    """
    lines = [
        f"directory {spool / layout.ORPHANS}",
        f"limit {settings.max_core_bytes}",
        f"reserve {round(settings.disk_reserve * 10)}",  # per mille
        f"most {MOST}",
        f"seconds {min(_WITHIN, max(1, round(settings.hold_deadline)))}",
        *_off(settings),
        *_handler(settings, handler),
    ]
    return "\n".join(lines) + "\n"


def _handler(settings: RecorderSettings, handler: Handler | None) -> Iterator[str]:
    if handler is not None:
        words = handler.order(max(1, round(settings.chain_deadline))).split(b"\0")[:-1]
        yield f"handler {os.fsdecode(b' '.join(words))}"  # no word holds a space


def _off(settings: RecorderSettings) -> Iterator[str]:
    """Give the rules of whose memory nothing is kept; the helper cannot choose stacks."""
    if settings.core != "full":
        yield "off everyone"
    for rule in settings.core_off_rules:
        yield from _rule(rule)


def _rule(rule: Rule) -> Iterator[str]:
    match rule.field:
        case "user" if not rule.pattern.isdecimal():
            try:
                yield f"off user {pwd.getpwnam(rule.pattern).pw_uid}"
            except KeyError:
                return  # no process is this user's
        case "label":
            yield "off containers"  # the helper knows no labels, and they may forbid a core
        case _:
            yield f"off {rule.field} {rule.pattern}"
