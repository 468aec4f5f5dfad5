"""Reading a file's chunks from the bus, whatever was sent twice, too early or not at all."""

import asyncio
import hashlib
import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.js.errors import NotFoundError

from crashbus.bus import Bus
from crashbus.chunks import Chunk, Encoder, Verifier
from crashbus.errors import ChunksMissing, DamagedFile

CONTENT = bytes(range(200))
SIZE = 40


class Stored:
    """A stream of one subject: gives the first message from a sequence on, as JetStream does."""

    def __init__(self, chunks: list[Chunk], gaps: list[int]) -> None:
        # Messages of other files lie between them.
        ends = [sum(gaps[: number + 1]) + number + 1 for number in range(len(chunks))]
        self._messages = list(zip(ends, chunks, strict=True))

    async def get_msg(self, stream: str, seq: int, **_: object) -> Any:
        for number, chunk in self._messages:
            if number >= seq:
                return SimpleNamespace(seq=number, headers=chunk.headers(), data=chunk.body)
        raise NotFoundError(code=404, err_code=10037, description="no message found")


def read(chunks: list[Chunk], gaps: list[int], count: int) -> list[Chunk]:
    bus = Bus.__new__(Bus)
    bus._js = Stored(chunks, gaps)  # type: ignore[assignment]
    bus._client = SimpleNamespace(refusals=0)  # type: ignore[assignment]

    async def all_of_them() -> list[Chunk]:
        return [chunk async for chunk in bus.chunks("0" * 16, "core_1", count)]

    return asyncio.run(all_of_them())


def are_there_in_order(sent: list[int], count: int) -> bool:
    due = 0
    for index in sent:
        due += index == due
    return due >= count


@given(st.integers(0, 5), st.data())
def test_any_prefix_order_and_repeat_is_the_file_or_missing(
    count: int, data: st.DataObject
) -> None:
    content = CONTENT[: count * SIZE]
    encoder = Encoder(SIZE, "zstd")
    chunks = list(encoder.chunks(io.BytesIO(content)))
    sent = data.draw(st.lists(st.integers(0, count - 1), max_size=16)) if count else []
    gaps = data.draw(st.lists(st.integers(0, 3), min_size=len(sent), max_size=len(sent)))

    if not are_there_in_order(sent, count):
        with pytest.raises(ChunksMissing):
            read([chunks[index] for index in sent], gaps, count)
        return
    found = read([chunks[index] for index in sent], gaps, count)

    verifier = Verifier("zstd")
    assert b"".join(verifier.accept(chunk) for chunk in found) == content
    verifier.finish(len(content), hashlib.sha256(content).hexdigest())


@given(st.integers(1, 5), st.data())
def test_a_sender_may_begin_again_at_any_chunk_however_often(
    count: int, data: st.DataObject
) -> None:
    """It loses the bus after some chunks, and goes on with one that it is not sure of."""
    chunks = list(Encoder(SIZE, "zstd").chunks(io.BytesIO(CONTENT[: count * SIZE])))
    sent: list[Chunk] = []
    confirmed = 0
    for lost_at in data.draw(st.lists(st.integers(1, count), max_size=4)):
        begin = data.draw(st.integers(0, confirmed))
        sent += chunks[begin:lost_at]
        confirmed = max(confirmed, lost_at)
    sent += chunks[data.draw(st.integers(0, confirmed)) :]

    assert read(sent, [0] * len(sent), count) == chunks


@given(st.integers(1, 5), st.data())
def test_damaged_copy_of_a_chunk_does_not_matter_where_a_good_one_follows(
    count: int, data: st.DataObject
) -> None:
    chunks = list(Encoder(SIZE, "zstd").chunks(io.BytesIO(CONTENT[: count * SIZE])))
    place = data.draw(st.integers(0, count - 1))
    damaged = replace(chunks[place], body=chunks[place].body[:-1])
    before = data.draw(st.integers(0, place))
    sent = [*chunks[:before], damaged, *chunks[before:]]
    assert read(sent, [0] * len(sent), count) == chunks

    alone = [*chunks[:place], damaged, *chunks[place + 1 :]]
    with pytest.raises(DamagedFile, match="its header says") as raised:
        read(alone, [0] * len(alone), count)
    assert not isinstance(raised.value, ChunksMissing)
