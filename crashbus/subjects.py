"""Subjects that are not those of one message: of chunks, and of one destination's work items."""

import hashlib

from crashbus import layout, names

LARGE = "large"  # last token of a work item that shippers have hands of their own for


def place_token(destination: str) -> str:
    """Return the last token of the subjects of a destination's work items."""
    return hashlib.sha256(destination.encode()).hexdigest()[:16]


def work_item_filter(destination: str, large: bool = False) -> str:
    """Return the subject filter that takes the work items of one destination and no other.

    Args:
        large: those of cores and binaries, or those of all other files.
    """
    subject = f"crash.file.*.*.*.{place_token(destination)}"
    return f"{subject}.{LARGE}" if large else subject


def chunk_subject(crash_id: str, file: str) -> str:
    """Return the subject that carries one file's chunks."""
    size = "chunk" if layout.is_large(file) else "small"
    return f"crash.{size}.{crash_id}.{names.token(file)}"
