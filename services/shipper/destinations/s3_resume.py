"""What of an object's parts is at the server already: pure decisions of an upload that is taken up.

A part is a run of whole chunks that ends with the first chunk that fills it, so whoever cuts the
same chunks with the same part size gets the same parts. A part at the server is trusted only if
its size and ETag, which is its MD5 sum, are those of the part that we would send. Where ETags are
no MD5 sums (encryption with KMS or customer keys) none matches, and the upload begins anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part, at the server or cut by us.

    Attributes:
        number: position in the object, from 1.
        size: in bytes.
        etag: without quotes; of ours: the hexadecimal MD5 sum.
    """

    number: int
    size: int
    etag: str


@dataclass(frozen=True)
class Unfinished:
    """An upload that somebody began and did not complete."""

    upload: str
    parts: Sequence[Part]

    @property
    def size(self) -> int:
        """Bytes at the server."""
        return sum(part.size for part in self.parts)


def to_take_up(found: Sequence[Unfinished], first: Part) -> Unfinished | None:
    """Return the upload to go on with; None where another has to be begun.

    Its first part must be ours: an upload of another file's content is not mixed with this one.
    Of several the fullest one is taken, by all shippers the same.
    """
    same = [one for one in found if first in one.parts]
    return max(same, key=lambda one: (one.size, one.upload), default=None)


def is_there(stored: Mapping[int, Part], part: Part) -> bool:
    """Tell whether a part need not be sent."""
    return stored.get(part.number) == part
