"""Destination ``s3://bucket/prefix``: objects on any server that speaks S3.

An object appears only when it is whole: up to one part it is written by one request, beyond that
by a multipart upload that is completed after the source was checked to its end. Afterwards the
server is asked what it has.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import aclosing

import structlog

from crashbus.destination import Destination
from crashbus.messages import CrashFile
from services.shipper.destinations.base import Deliverer
from services.shipper.destinations.s3_api import S3Api, Stat
from services.shipper.destinations.s3_failures import as_failure
from services.shipper.failure import Failure, Final, Passing, Unfit
from services.shipper.settings import MIB, ShipperSettings
from services.shipper.source import Source
from services.shipper.threads import run_whole

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MAX_PARTS = 10_000  # https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MAX_PART_SIZE = 64 * MIB  # ours: a part is held in memory
MAX_KEY = 1024  # bytes of UTF-8
ABORT_WITHIN = 3.0  # seconds: what is not aborted now is removed by the next delivery
PATIENCE = 1.5  # seconds a cancelled delivery waits for the request that is under way

META_SHA256 = "x-amz-meta-crashbus-sha256"
META_SIZE = "x-amz-meta-crashbus-size"


class S3Deliverer(Deliverer):
    """Delivers objects to one bucket."""

    def __init__(self, destination: Destination, settings: ShipperSettings) -> None:
        super().__init__(destination)
        self._api = S3Api(settings)
        self._part_size = settings.s3_part_size
        self._may_create = settings.s3_create_bucket

    async def check(self) -> None:
        await run_whole(self._check, patience=PATIENCE)

    def _check(self) -> None:
        bucket = self.destination.bucket
        with as_failure(f"s3://{bucket}"):
            if self._api.bucket_exists(bucket):
                return
            if self._may_create:
                self._api.make_bucket(bucket)
                log.info("made the bucket", bucket=bucket)
                return
        mend = "make the bucket, or set CRASHBUS_SHIPPER_S3_CREATE_BUCKET=true"
        raise Final("no_such_bucket", f"there is no bucket {bucket}", mend)

    async def deliver(self, folder: str, sources: Sequence[Source]) -> None:
        for source in sources:
            try:
                await self._deliver(folder, source)
            except Final as failure:
                if failure.reason != "no_such_bucket" or not self._may_create:
                    raise
                await self.check()
                raise Passing("bucket_was_missing", str(failure), "nothing: it was made") from None

    async def _deliver(self, folder: str, source: Source) -> None:
        upload = self._upload(folder, source.file)
        try:
            async with aclosing(source.pieces()) as pieces:
                async for piece in pieces:
                    await run_whole(upload.write, piece.stored, patience=PATIENCE)
            await run_whole(upload.complete, patience=PATIENCE)
        except BaseException:
            await self._abort(upload)
            raise

    async def _abort(self, upload: "Upload") -> None:
        try:
            await asyncio.wait_for(asyncio.to_thread(upload.abort), ABORT_WITHIN)
        except (Failure, TimeoutError) as failure:
            log.warning("could not abort an upload, the next delivery will", error=str(failure))

    async def sha256_of(self, folder: str, name: str) -> str | None:
        key = "/".join(filter(None, (self.destination.prefix, folder, name)))
        return await run_whole(self._sha256_of, key, patience=PATIENCE)

    def _sha256_of(self, key: str) -> str | None:
        bucket = self.destination.bucket
        try:
            with as_failure(f"s3://{bucket}/{key}"):
                return self._api.stat(bucket, key).headers.get(META_SHA256, "")
        except Failure as failure:
            # Who may not list a bucket is refused what is not there, AWS's HeadObject.
            if failure.reason in ("object_vanished", "no_such_bucket", "access_denied"):
                return None
            raise

    def _upload(self, folder: str, file: CrashFile) -> "Upload":
        key = self._key(folder, file)
        if len(key.encode()) > MAX_KEY:
            mend = "shorten the prefix in CRASHBUS_DESTINATIONS or the host's name"
            raise Unfit(file, "name_too_long", f"the key has more than {MAX_KEY} bytes", mend)
        part_size = max(self._part_size, -(-file.stored_size // MAX_PARTS))
        if part_size > MAX_PART_SIZE:
            mend = "limit the size of core dumps"
            raise Unfit(
                file, "file_too_large", f"more than {MAX_PARTS * MAX_PART_SIZE} bytes", mend
            )
        return Upload(self._api, self.destination.bucket, key, file, part_size)

    def _key(self, folder: str, file: CrashFile) -> str:
        return "/".join(filter(None, (self.destination.prefix, folder, file.stored_name)))

    def url_of(self, folder: str, file: CrashFile) -> str:
        return f"s3://{self.destination.bucket}/{self._key(folder, file)}"


class Upload:
    """One object on its way. Holds up to one part and one chunk in memory; its calls block."""

    def __init__(self, api: S3Api, bucket: str, key: str, file: CrashFile, part_size: int) -> None:
        self._api = api
        self._bucket = bucket
        self._key = key
        self._headers = {
            "Content-Type": "application/zstd"
            if file.encoding == "zstd"
            else "application/octet-stream",
            META_SHA256: file.sha256,
            META_SIZE: str(file.size),
        }
        self._part_size = part_size
        self._buffer = bytearray()
        self._size = 0
        self._upload_id = ""
        self._part_etags: list[str] = []
        self._part_md5s: list[bytes] = []

    @property
    def _place(self) -> str:
        return f"s3://{self._bucket}/{self._key}"

    def write(self, data: bytes) -> None:
        """Append data; sends a part when there is enough for one."""
        self._buffer += data
        self._size += len(data)
        if len(self._buffer) >= self._part_size:
            with as_failure(self._place):
                self._send_part()

    def _send_part(self) -> None:
        if not self._upload_id:
            self._upload_id = self._api.begin(self._bucket, self._key, self._headers)
        number = len(self._part_etags) + 1
        etag = self._api.put_part(self._bucket, self._key, self._upload_id, number, self._buffer)
        self._part_etags.append(etag)
        self._part_md5s.append(_md5(self._buffer))
        self._buffer = bytearray()

    def complete(self) -> None:
        """Make what was written an object, and see that the server has exactly that."""
        with as_failure(self._place):
            if self._upload_id:
                self._complete_parts()
                expected = f"{_md5(b''.join(self._part_md5s)).hex()}-{len(self._part_md5s)}"
            else:
                self._api.put(self._bucket, self._key, self._buffer, self._headers)
                expected = _md5(self._buffer).hex()
            self._verify(self._api.stat(self._bucket, self._key), expected)

    def _complete_parts(self) -> None:
        if self._buffer:
            self._send_part()
        self._api.complete(self._bucket, self._key, self._upload_id, self._part_etags)
        self._upload_id = ""
        self._remove_abandoned()

    def _remove_abandoned(self) -> None:
        """Remove uploads to the same key that a dead shipper, or a dead server, left behind."""
        try:
            with as_failure(self._place):
                for upload in self._api.unfinished(self._bucket, self._key):
                    self._api.abort(self._bucket, self._key, upload)
                    log.info("removed an abandoned upload", place=self._place, upload=upload)
        except Failure as failure:
            # The object is complete; leftovers cost room, not data.
            log.warning("cannot remove abandoned uploads", error=str(failure))

    def _verify(self, stat: Stat, etag: str) -> None:
        wrong = mismatch(stat, self._size, etag, self._headers[META_SHA256])
        if wrong:
            mend = "see who else writes to the bucket, and the S3 server's log"
            raise Passing("not_as_written", f"{self._place}: {wrong}", mend)

    def abort(self) -> None:
        """Take back what was not completed."""
        if self._upload_id:
            with as_failure(self._place):
                self._api.abort(self._bucket, self._key, self._upload_id)
            self._upload_id = ""


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


def _md5(data: bytes | bytearray) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()
