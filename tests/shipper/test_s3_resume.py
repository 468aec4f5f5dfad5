"""Which parts of an upload that others began need not be sent again."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from services.shipper.destinations.s3_resume import Part, Unfinished, is_there, to_take_up

CONTENTS = st.lists(st.binary(min_size=1, max_size=8), min_size=1, max_size=12)


def part(number: int, content: bytes) -> Part:
    return Part(number, len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())


def cut(contents: list[bytes]) -> list[Part]:
    return [part(number, content) for number, content in enumerate(contents, start=1)]


class Server:
    """Keeps parts as an S3 server does: a part sent again replaces the one before."""

    def __init__(self) -> None:
        self.uploads: dict[str, dict[int, Part]] = {}

    def unfinished(self) -> list[Unfinished]:
        return [Unfinished(name, [*parts.values()]) for name, parts in self.uploads.items()]

    def deliver(self, parts: list[Part], dies_after: int | None = None) -> tuple[str, int]:
        """Return the upload's name, and how many parts were sent."""
        known = to_take_up(self.unfinished(), parts[0])
        name = known.upload if known else f"upload-{len(self.uploads)}"
        stored = {one.number: one for one in known.parts} if known else {}
        there, sent = self.uploads.setdefault(name, {}), 0
        for one in parts[:dies_after]:
            if not is_there(stored, one):
                there[one.number] = one
                sent += 1
        return name, sent


@given(CONTENTS, st.lists(st.integers(0, 12), max_size=6))
def test_after_any_prefixes_only_what_is_missing_is_sent(
    contents: list[bytes], deaths: list[int]
) -> None:
    parts, server = cut(contents), Server()
    for died_after in deaths:
        server.deliver(parts, died_after)
    furthest = min(len(parts), max(deaths, default=0))

    name, sent = server.deliver(parts)

    assert [server.uploads[name][one.number] for one in parts] == parts
    assert sent == len(parts) - furthest


@given(CONTENTS, CONTENTS, st.integers(0, 12))
def test_parts_of_another_content_are_never_taken_for_ours(
    ours: list[bytes], others: list[bytes], died_after: int
) -> None:
    server = Server()
    server.deliver(cut(others), died_after)

    name, _ = server.deliver(cut(ours))

    assert [server.uploads[name][one.number] for one in cut(ours)] == cut(ours)


@given(CONTENTS, st.permutations(range(12)), st.integers(0, 12))
def test_parts_that_arrived_in_any_order_are_found(
    contents: list[bytes], order: list[int], count: int
) -> None:
    parts = cut(contents)
    arrived = [parts[n] for n in order[:count] if n < len(parts)]
    found = to_take_up([Unfinished("begun", arrived)], parts[0])

    assert (found is not None) == (parts[0] in arrived)
    stored = {one.number: one for one in arrived}
    assert [one for one in parts if not is_there(stored, one)] == [
        one for one in parts if one not in arrived
    ]


@given(CONTENTS, st.lists(st.integers(1, 12), min_size=2, max_size=5))
def test_all_shippers_take_up_the_same_of_several_uploads(
    contents: list[bytes], lengths: list[int]
) -> None:
    parts = cut(contents)
    found = [Unfinished(f"u{n}", parts[:length]) for n, length in enumerate(lengths)]

    one, other = to_take_up(found, parts[0]), to_take_up(found[::-1], parts[0])

    assert one is not None
    assert one == other
    assert one.size == max(each.size for each in found)


def test_part_whose_etag_is_no_md5_is_sent_again() -> None:
    ours = part(1, b"x")
    assert not is_there({1: Part(1, 1, "not-an-md5")}, ours)
