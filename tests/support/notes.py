"""A note about a small crash, as services/recorder/taker/note.c makes it."""

import struct
from collections.abc import Mapping

from services.common.unrecorded import NOTE, PARTS


def packed(note: Mapping[str, bytes]) -> bytes:
    """Return a note of these parts; one for which there is no room is left out."""
    head = 4 + 4 * len(PARTS)
    room, parts = NOTE - head, []
    for name in PARTS:
        part = note.get(name, b"")
        parts.append(part if len(part) <= room else b"")
        room -= len(parts[-1])
    return b"note" + struct.pack(f"={len(PARTS)}I", *map(len, parts)) + b"".join(parts)
