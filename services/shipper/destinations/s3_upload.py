"""One object on its way to an S3 server, taken up where another shipper left it.

The whole file is read from the bus and checked in any case, since only its SHA-256 says that the
object may be completed; what is spared is sending the parts that are there.
"""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import structlog
from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_random,
)

from crashbus.parts import CrashFile
from services.shipper import metrics
from services.shipper.destinations.part_buffer import PartBuffer, PartBuffers
from services.shipper.destinations.s3_api import S3Api, Stat
from services.shipper.destinations.s3_failures import as_failure
from services.shipper.destinations.s3_resume import Part, Unfinished, is_there, to_take_up
from services.shipper.failure import Failure, Passing
from services.shipper.threads import run_whole, seen

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Ts = TypeVarTuple("Ts")
R = TypeVar("R")

AT_ONCE = 2  # parts of one object on their way: while one is sent the next is made
PATIENCE = 1.5  # seconds a cancelled delivery waits for the request that is under way
ABORT_WITHIN = 3.0  # seconds: what is not aborted now is removed later

META_SHA256 = "x-amz-meta-crashbus-sha256"
META_SIZE = "x-amz-meta-crashbus-size"


@dataclass(frozen=True)
class Place:
    """Where an object goes.

    Attributes:
        buffers: shared by all uploads to a destination: each part has one from its first byte
            until the server has it.
    """

    api: S3Api
    bucket: str
    key: str
    part_size: int
    buffers: PartBuffers

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


class Upload:
    """Holds in memory the part that is being filled, and those on their way.

    Args:
        progress: called for each part that is at the server.
    """

    def __init__(self, place: Place, file: CrashFile, progress: Callable[[], None]) -> None:
        self._place = place
        self._api = place.api
        self._at = (place.bucket, place.key)
        self._progress = progress
        self._headers = {
            "Content-Type": "application/zstd"
            if file.encoding == "zstd"
            else "application/octet-stream",
            META_SHA256: file.sha256,
            META_SIZE: str(file.size),
        }
        self._only_if_free = file.only_if_free
        # Small files never wait for a buffer that large ones hold.
        self._is_small = file.stored_size <= place.part_size
        self._buffer = PartBuffer(file.stored_size) if self._is_small else None
        self._size = 0
        self._upload_id = ""
        self._parts: list[Part] = []  # as they were cut
        self._stored: dict[int, Part] = {}  # as the server had them before
        self._etags: dict[int, str] = {}  # as the server gives them now
        self._sending: set[asyncio.Task[None]] = set()

    async def write(self, data: bytes) -> None:
        """Append data; sends a part when there is enough for one."""
        if self._buffer is None:
            self._buffer = await self._place.buffers.take()
        self._buffer.append(data)
        self._size += len(data)
        if len(self._buffer) >= self._place.part_size and not self._is_small:
            await self._send_part(self._buffer)

    async def complete(self) -> None:
        """Make what was written an object, and see that the server has exactly that."""
        if self._parts:
            if self._buffer:
                await self._send_part(self._buffer)
            self._free_buffer()
            await self._until_sending(0)
            await self._call(self._complete_parts)
        else:
            await self._call(self._put_whole)

    async def leave(self, for_good: bool) -> None:
        """Stop; what is at the server stays for whoever takes it up, or goes for good."""
        self._free_buffer()
        for task in self._sending:
            task.cancel()
        if self._sending:
            await asyncio.wait(self._sending, timeout=2 * PATIENCE)
        if not for_good or not self._upload_id:
            return
        try:
            await asyncio.wait_for(asyncio.to_thread(self._abort), ABORT_WITHIN)
        except (Failure, TimeoutError) as failure:
            log.warning("could not abort an upload, it is removed later", error=str(failure))

    async def _call(self, call: Callable[[*Ts], R], *args: *Ts) -> R:
        def as_ours() -> R:
            with as_failure(str(self._place)):
                return call(*args)

        return await run_whole(as_ours, patience=PATIENCE)

    async def _send_part(self, full: PartBuffer) -> None:
        digest = await asyncio.to_thread(_md5, full.content)
        part = Part(len(self._parts) + 1, len(full), digest.hex())
        self._parts.append(part)
        if not self._upload_id:
            await self._call(self._take_up_or_begin, part)
        if is_there(self._stored, part):
            metrics.PART_BYTES.labels("found").inc(part.size)
            self._note(part, part.etag)
            full.clear()
            return  # the next part takes over the buffer
        await self._until_sending(AT_ONCE - 1)
        task = asyncio.create_task(self._put_part(part, full, digest), name="part")
        task.add_done_callback(seen)  # of several that fail one is told
        # Not in the task: one that is cancelled before it begins would keep it for ever. A request
        # that failed has ended; only one that was left alone may still read the buffer.
        task.add_done_callback(
            lambda done: self._place.buffers.give_back(full, in_use=done.cancelled())
        )
        self._sending.add(task)
        self._buffer = None

    def _free_buffer(self) -> None:
        if self._buffer is not None and not self._is_small:
            self._place.buffers.give_back(self._buffer)
            self._buffer = None

    async def _put_part(self, part: Part, full: PartBuffer, digest: bytes) -> None:
        put, upload = self._api.put_part, self._upload_id
        etag = await self._call(put, *self._at, upload, part.number, full.content, digest)
        metrics.PART_BYTES.labels("sent").inc(part.size)
        self._note(part, etag)

    def _note(self, part: Part, etag: str) -> None:
        self._etags[part.number] = etag
        self._progress()

    async def _until_sending(self, at_most: int) -> None:
        """Wait until so few parts are on their way, and see that all others have arrived."""
        while len(self._sending) > at_most:
            done, self._sending = await asyncio.wait(
                self._sending, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()

    def _take_up_or_begin(self, first: Part) -> None:
        known = to_take_up(self._unfinished(), first)
        if known is None:
            self._upload_id = self._api.begin(*self._at, self._headers)
            return
        self._upload_id = known.upload
        self._stored = {part.number: part for part in known.parts}
        log.info(
            "takes up an upload", place=str(self._place), parts=len(known.parts), bytes=known.size
        )

    def _unfinished(self) -> list[Unfinished]:
        try:
            with as_failure(str(self._place)):
                uploads = self._api.unfinished(*self._at)
                return [Unfinished(one, self._api.parts(*self._at, one)) for one in uploads]
        except Failure as failure:
            # A key need not have the right to list; one that vanishes meanwhile is no loss.
            if failure.reason not in ("access_denied", "upload_vanished"):
                raise
            log.info("cannot look for an upload to take up", error=str(failure))
            return []

    def _put_whole(self) -> None:
        content = self._buffer.content if self._buffer is not None else memoryview(b"")
        digest = _md5(content)
        put = self._api.put_if_free if self._only_if_free else self._api.put
        put(*self._at, content, digest, self._headers)
        self._verify(self._api.stat(*self._at), digest.hex())

    def _complete_parts(self) -> None:
        md5s = b"".join(bytes.fromhex(part.etag) for part in self._parts)
        expected = f"{_md5(md5s).hex()}-{len(self._parts)}"
        etags = [self._etags[part.number] for part in self._parts]
        complete = self._api.complete
        if self._only_if_free:
            self._check_free()  # for servers that know no conditions
            complete = self._api.complete_if_free
        try:
            with as_failure(str(self._place)):
                complete(*self._at, self._upload_id, etags)
        except Passing as failure:
            # It may have been done all the same: by us, the answer lost; by another shipper.
            if not self._is_complete(expected):
                raise
            log.info("was completed all the same", place=str(self._place), error=str(failure))
        else:
            self._verify(self._api.stat(*self._at), expected)
        self._upload_id = ""
        remove_unfinished(self._api, *self._at)

    def _check_free(self) -> None:
        """See that no other object has the key: it was long ago that it was looked at."""
        try:
            with as_failure(str(self._place)):
                found = self._api.stat(*self._at).headers.get(META_SHA256)
        except Failure:
            return
        if found != self._headers[META_SHA256]:
            raise Passing("name_taken", f"{self._place} is there now", "nothing: it is compared")

    def _is_complete(self, etag: str) -> bool:
        try:
            with as_failure(str(self._place)):
                found = self._api.stat(*self._at)
        except Failure:
            return False
        named = found.headers.get(META_SHA256) == self._headers[META_SHA256]
        return named and self._mismatch(found, etag) is None

    def _verify(self, stat: Stat, etag: str) -> None:
        wrong = self._mismatch(stat, etag)
        if wrong:
            mend = "see who else writes to the bucket, and the S3 server's log"
            raise Passing("not_as_written", f"{self._place}: {wrong}", mend)

    def _mismatch(self, stat: Stat, etag: str) -> str | None:
        return mismatch(stat, self._size, etag, self._headers[META_SHA256])

    def _abort(self) -> None:
        with as_failure(str(self._place)):
            self._api.abort(*self._at, self._upload_id)


def remove_unfinished(api: S3Api, bucket: str, key: str) -> None:
    """Remove uploads to a key that a dead shipper, or a dead server, left behind.

    That it cannot be done is only told: leftovers cost room, not data, and there is a sweep.
    """
    place = f"s3://{bucket}/{key}"

    def remove() -> None:
        with as_failure(place):
            for upload in api.unfinished(bucket, key):
                api.abort(bucket, key, upload)
                log.info("removed an abandoned upload", place=place, upload=upload)

    try:
        _LEFTOVERS(remove)
    except Failure as failure:
        log.warning("cannot remove abandoned uploads", error=str(failure))


# The file is delivered, so nobody else looks for them before the sweep; nor shall it take long.
_LEFTOVERS = Retrying(
    retry=retry_if_exception_type(Passing),
    wait=wait_exponential(multiplier=0.1, max=1) + wait_random(0, 0.1),
    stop=stop_after_attempt(8) | stop_after_delay(5),
    reraise=True,
)


def mismatch(stat: Stat, size: int, etag: str, sha256: str) -> str | None:
    """Return in what an object differs from what was written; None if in nothing."""
    if stat.size != size:
        return f"the object has {stat.size} bytes, {size} were written"
    if stat.headers.get(META_SHA256, sha256) != sha256:
        return "the object is of another file"
    if _is_md5(stat) and stat.etag != etag:
        return f"the object's ETag is {stat.etag}, not {etag}"
    return None


def _is_md5(stat: Stat) -> bool:
    """Tell whether the ETag is made of MD5 sums; with customer or KMS keys it is not.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    encryption = stat.headers.get("x-amz-server-side-encryption", "")
    customer = "x-amz-server-side-encryption-customer-algorithm" in stat.headers
    digits, _, parts = stat.etag.partition("-")
    looks_like = len(digits) == 32 and (not parts or parts.isdigit())
    return looks_like and not encryption.startswith("aws:kms") and not customer


def _md5(data: bytes | memoryview) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()
