"""The chunk codec: any file, cut anywhere, comes out as it went in, or not at all."""

import dataclasses
import hashlib
import io
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from crashbus.chunks import MAX_CHUNK_SIZE, ZERO_RUN, Chunk, Encoder, Verifier, chunk_size
from crashbus.errors import DamagedFile
from crashbus.fields import Encoding

ENCODINGS = st.sampled_from(["zstd", "identity"])
# Runs of zeros and repeats, as core dumps have them, beside noise.
FILES = st.one_of(
    st.binary(max_size=2000),
    st.lists(st.sampled_from([bytes(64), b"\xff" * 7, b"stack"]), max_size=60).map(b"".join),
)
SIZES = st.integers(1, 300)


def encode(content: bytes, size: int, encoding: Encoding) -> tuple[Encoder, list[Chunk]]:
    encoder = Encoder(size, encoding)
    return encoder, list(encoder.chunks(io.BytesIO(content)))


def verify(chunks: list[Chunk], encoding: Encoding, size: int, sha256: str) -> bytes:
    verifier = Verifier(encoding)
    content = b"".join(verifier.accept(chunk) for chunk in chunks)
    verifier.finish(size, sha256)
    return content


@given(FILES, SIZES, ENCODINGS)
def test_any_file_survives_any_cut(content: bytes, size: int, encoding: Encoding) -> None:
    encoder, chunks = encode(content, size, encoding)

    assert encoder.size == len(content)
    assert encoder.sha256 == hashlib.sha256(content).hexdigest()
    assert encoder.count == len(chunks)
    least = -(-len(content) // (ZERO_RUN * encoder.range_size))
    assert least <= len(chunks) <= -(-len(content) // size)
    assert encoder.stored_size == sum(len(chunk.body) for chunk in chunks)
    assert verify(chunks, encoding, encoder.size, encoder.sha256) == content


@given(FILES, SIZES, ENCODINGS)
def test_chunks_end_to_end_are_the_object(content: bytes, size: int, encoding: Encoding) -> None:
    _, chunks = encode(content, size, encoding)
    stored = b"".join(chunk.body for chunk in chunks)

    if encoding == "identity":
        assert stored == content
    elif stored:
        reader = zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True)
        assert reader.read() == content


@given(FILES, SIZES, ENCODINGS, st.data())
def test_any_chunk_can_be_made_again_from_its_range_alone(
    content: bytes, size: int, encoding: Encoding, data: st.DataObject
) -> None:
    _, chunks = encode(content, size, encoding)
    if not chunks:
        return
    chunk = data.draw(st.sampled_from(chunks))
    before = sum(one.size for one in chunks[: chunk.index])
    (again,) = Encoder(size, encoding).packer.pack(content[before:][: chunk.size])

    assert (again.body, again.sha256, again.size) == (chunk.body, chunk.sha256, chunk.size)


@given(FILES, SIZES, ENCODINGS, st.randoms(use_true_random=False))
def test_ranges_may_be_packed_in_any_order_by_any_thread(
    content: bytes, size: int, encoding: Encoding, chance: random.Random
) -> None:
    encoder, chunks = encode(content, size, encoding)
    starts = list(range(0, len(content), encoder.range_size))
    order = chance.sample(starts, len(starts))

    with ThreadPoolExecutor(3) as threads:
        packed = threads.map(
            lambda start: encoder.packer.pack(content[start:][: encoder.range_size]), order
        )
        packed_of = dict(zip(order, packed, strict=True))

    again = Encoder(size, encoding).number(one for start in starts for one in packed_of[start])
    assert list(again) == chunks


def test_what_compresses_travels_in_fewer_messages_and_what_does_not_fits_them_still() -> None:
    size = chunk_size(1024 * 1024)
    text, noise = b"a core dump of small objects " * (size // 5), os.urandom(5 * size)

    _, of_text = encode(text, size, "zstd")
    _, of_noise = encode(noise, size, "zstd")
    _, of_both = encode(noise[: 2 * size] + text[: 2 * size], size, "zstd")

    assert [chunk.size for chunk in of_text] == [2 * size, 2 * size, len(text) - 4 * size]
    assert [chunk.size for chunk in of_noise] == 5 * [size]
    assert [chunk.size for chunk in of_both] == [size, size, 2 * size]
    for chunk in of_text + of_noise + of_both:
        headers = sum(len(name) + len(value) for name, value in chunk.headers().items())
        assert len(chunk.body) + headers + 100 < 1024 * 1024


def test_what_is_nothing_but_zeros_travels_in_fewer_messages_still() -> None:
    fits = chunk_size(1024 * 1024)
    size = 2 * fits
    content = bytes(9 * size) + os.urandom(fits) + bytes(size - fits + 2 * size) + bytes(7)

    _, chunks = encode(content, fits, "zstd")

    whole = [chunk.size for chunk in chunks]
    assert whole[:3] == [4 * size, 4 * size, size]
    assert whole[-3:] == [size, size, 7]
    assert verify(chunks, "zstd", len(content), hashlib.sha256(content).hexdigest()) == content


@pytest.mark.parametrize("payload", [1, 4, 6, 8, 16])
def test_no_chunk_is_larger_than_who_receives_it_allows(payload: int) -> None:
    _, chunks = encode(bytes(20_000_000) + b"x", chunk_size(payload * 1024 * 1024), "zstd")

    assert [Chunk.received(chunk.headers(), chunk.body) for chunk in chunks] == chunks


@given(FILES, SIZES, ENCODINGS)
def test_headers_carry_a_chunk(content: bytes, size: int, encoding: Encoding) -> None:
    _, chunks = encode(content, size, encoding)

    assert [Chunk.received(chunk.headers(), chunk.body) for chunk in chunks] == chunks


@given(FILES.filter(lambda content: len(content) > 1), ENCODINGS, st.data())
def test_any_change_of_order_or_number_is_noticed(
    content: bytes, encoding: Encoding, data: st.DataObject
) -> None:
    encoder, chunks = encode(content, max(1, len(content) // 10), encoding)
    others = data.draw(st.lists(st.sampled_from(chunks), max_size=8).filter(lambda o: o != chunks))

    with pytest.raises(DamagedFile):
        verify(others, encoding, encoder.size, encoder.sha256)


@given(FILES.filter(bool), SIZES, ENCODINGS, st.data())
def test_a_changed_body_is_noticed_by_its_hash(
    content: bytes, size: int, encoding: Encoding, data: st.DataObject
) -> None:
    chunk = data.draw(st.sampled_from(encode(content, size, encoding)[1]))
    changed = bytearray(chunk.body)
    place = data.draw(st.integers(0, len(changed) - 1))
    changed[place] ^= data.draw(st.integers(1, 255))

    with pytest.raises(DamagedFile):
        Chunk.received(chunk.headers(), bytes(changed))
    with pytest.raises(DamagedFile):
        Chunk.received(chunk.headers(), chunk.body[:-1])


@settings(max_examples=300)
@given(FILES.filter(bool), SIZES, st.data())
def test_a_forged_frame_is_never_taken_for_the_file(
    content: bytes, size: int, data: st.DataObject
) -> None:
    """An attacker can make the hash fit the body, but not the body fit the file."""
    encoder, chunks = encode(content, size, "zstd")
    index = data.draw(st.integers(0, len(chunks) - 1))
    forged = bytearray(chunks[index].body)
    place = data.draw(st.integers(0, len(forged) - 1))
    forged[place] ^= data.draw(st.integers(1, 255))
    body = bytes(forged)
    sha256 = hashlib.sha256(body).hexdigest()
    chunks[index] = dataclasses.replace(chunks[index], body=body, sha256=sha256)

    try:
        result = verify(chunks, "zstd", encoder.size, encoder.sha256)
    except DamagedFile:
        return
    assert result == content  # only bits that say nothing were changed


@given(st.binary(max_size=200), st.integers(1, 500))
def test_any_bytes_at_all_are_a_frame_or_damaged(body: bytes, size: int) -> None:
    chunk = Chunk(0, size, body, hashlib.sha256(body).hexdigest())

    try:
        data = Verifier("zstd").accept(chunk)
    except DamagedFile:
        return
    assert len(data) == size


def test_frame_that_holds_more_than_it_announces_is_refused_unread() -> None:
    bomb = zstandard.compress(bytes(64 * 1024 * 1024))
    chunk = Chunk(0, 5, bomb, hashlib.sha256(bomb).hexdigest())

    with pytest.raises(DamagedFile, match="frame of 67108864, not 5"):
        Verifier("zstd").accept(chunk)


def test_frame_that_hides_its_size_is_refused() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    body = compressor.compress(b"content")
    chunk = Chunk(0, 7, body, hashlib.sha256(body).hexdigest())

    with pytest.raises(DamagedFile):
        Verifier("zstd").accept(chunk)


def test_second_frame_behind_the_first_is_not_stored_unseen() -> None:
    """The body is what a destination stores, so nothing in it may go unchecked."""
    frame = zstandard.compress(b"content")
    body = frame + zstandard.compress(b"smuggled")
    chunk = Chunk(0, 7, body, hashlib.sha256(body).hexdigest())

    with pytest.raises(DamagedFile):
        Verifier("zstd").accept(chunk)


@given(st.binary(max_size=20_000), st.integers(-5, 19), st.booleans())
def test_frame_of_any_compressor_is_one_frame(content: bytes, level: int, checksum: bool) -> None:
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum)
    body = compressor.compress(b"x" + 3 * content)
    chunk = Chunk(0, 1 + 3 * len(content), body, hashlib.sha256(body).hexdigest())

    assert Verifier("zstd").accept(chunk) == b"x" + 3 * content


@pytest.mark.parametrize(
    "body",
    [
        zstandard.compress(b"content") + b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc",  # is skipped
        zstandard.compress(b"content") + b"\0",
        zstandard.compress(b"content")[:-1],
        zstandard.ZstdCompressor(write_checksum=True).compress(b"content")[:-1],
        zstandard.compress(b"content")[:9],
    ],
)
def test_what_is_not_exactly_one_frame_is_refused(body: bytes) -> None:
    chunk = Chunk(0, 7, body, hashlib.sha256(body).hexdigest())

    with pytest.raises(DamagedFile):
        Verifier("zstd").accept(chunk)


def test_chunks_are_unpacked_in_any_order_into_memory_that_is_used_again() -> None:
    content = os.urandom(300)  # which does not compress
    encoder, chunks = encode(content, 100, "zstd")
    verifier, buffer = Verifier("zstd"), bytearray(200)
    assert bytes(verifier.unpack(chunks[2], buffer)) == content[200:]

    for chunk in chunks:
        verifier.take(chunk, verifier.unpack(chunk, buffer))

    verifier.finish(300, encoder.sha256)


@pytest.mark.parametrize(
    "changes",
    [
        {"Crashbus-Index": "-1"},
        {"Crashbus-Index": "x"},
        {"Crashbus-Size": "0"},
        {"Crashbus-Size": str(MAX_CHUNK_SIZE + 1)},
        {"Crashbus-Size": "9" * 5000},
        {"Crashbus-SHA256": ""},
    ],
    ids=str,
)
def test_bad_header_is_damage(changes: dict[str, str]) -> None:
    (chunk,) = encode(b"content", 100, "zstd")[1]

    with pytest.raises(DamagedFile):
        Chunk.received(chunk.headers() | changes, chunk.body)
    with pytest.raises(DamagedFile):
        Chunk.received(None, chunk.body)


@given(st.integers(0, 64 * 1024 * 1024))
def test_chunk_with_its_headers_fits_the_server_or_is_refused(max_payload: int) -> None:
    try:
        size = chunk_size(max_payload)
    except ValueError:
        assert max_payload < 256 * 1024
        return
    # zstd.h, ZSTD_COMPRESSBOUND
    worst = size + (size >> 8) + ((128 * 1024 - size) >> 11 if size < 128 * 1024 else 0)
    headers = sum(
        len(name) + len(value)
        for name, value in Chunk(2**40, size, b"", "f" * 64).headers().items()
    )
    assert worst + headers + 100 < max_payload
    assert size <= MAX_CHUNK_SIZE
