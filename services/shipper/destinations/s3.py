"""Destination ``s3://bucket/prefix``: objects on any server that speaks S3.

An object appears only when it is whole: up to one part it is written by one request, beyond that
by a multipart upload that is completed after the source was checked to its end. Afterwards the
server is asked what it has. An upload that was not finished stays for the next try, of whichever
shipper, and is aborted where there will be none.
"""

import time
from collections.abc import Sequence
from contextlib import aclosing

import structlog

from crashbus import layout
from crashbus.destination import Destination
from crashbus.parts import CrashFile
from services.shipper.destinations.base import Deliverer
from services.shipper.destinations.part_buffer import PartBuffers
from services.shipper.destinations.s3_api import Begun, S3Api
from services.shipper.destinations.s3_failures import as_failure
from services.shipper.destinations.s3_upload import (
    META_SHA256,
    PATIENCE,
    Place,
    Upload,
    remove_unfinished,
)
from services.shipper.failure import Failure, Final, Passing, Unfit
from services.shipper.settings import MIB, ShipperSettings
from services.shipper.source import Source
from services.shipper.threads import run_whole

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MAX_PARTS = 10_000  # https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MAX_PART_SIZE = 64 * MIB  # ours: a part is held in memory
MAX_KEY = 1024  # bytes of UTF-8
PARTS_IN_MEMORY = 5  # of all large objects together


class S3Deliverer(Deliverer):
    """Delivers objects to one bucket."""

    def __init__(self, destination: Destination, settings: ShipperSettings) -> None:
        super().__init__(destination)
        self._api = S3Api(settings)
        self._part_size = settings.s3_part_size
        self._may_create = settings.s3_create_bucket
        self._abandoned_after = settings.s3_abandoned_after
        self._buffers = PartBuffers(PARTS_IN_MEMORY, self._part_size)

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
        upload = Upload(self._place(folder, source.file), source.file, source.progress)
        try:
            async with aclosing(source.pieces()) as pieces:
                async for piece in pieces:
                    await upload.write(piece.stored)
            await upload.complete()
        except BaseException as error:
            await upload.leave(for_good=isinstance(error, Final))
            raise

    async def give_up(self, folder: str, file: CrashFile) -> None:
        if file.stored_size > self._part_size:
            bucket, key = self.destination.bucket, self._key(folder, file)
            await run_whole(remove_unfinished, self._api, bucket, key, patience=PATIENCE)

    async def tidy(self) -> None:
        await run_whole(self._tidy, patience=PATIENCE)

    def _tidy(self) -> None:
        """Remove uploads that nobody has gone on with for long, such as of a lost work item.

        Others may use the bucket, and even the prefix: only what is named as ours is ours.
        """
        bucket, prefix = self.destination.bucket, self.destination.prefix
        below = f"{prefix}/" if prefix else ""
        with as_failure(f"s3://{bucket}/{below}"):
            for begun in self._api.all_unfinished(bucket, below):
                ours = layout.is_object(begun.key.removeprefix(below))
                if ours and self._is_abandoned(begun):
                    self._api.abort(bucket, begun.key, begun.upload)
                    log.info("removed an abandoned upload", bucket=bucket, key=begun.key)

    def _is_abandoned(self, begun: Begun) -> bool:
        since = time.time() - self._abandoned_after
        if begun.time > since:
            return False
        latest = self._api.latest_part(self.destination.bucket, begun.key, begun.upload)
        return latest is None or latest < since

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

    def _place(self, folder: str, file: CrashFile) -> Place:
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
        return Place(self._api, self.destination.bucket, key, part_size, self._buffers)

    def _key(self, folder: str, file: CrashFile) -> str:
        return "/".join(filter(None, (self.destination.prefix, folder, file.stored_name)))

    def url_of(self, folder: str, file: CrashFile) -> str:
        return f"s3://{self.destination.bucket}/{self._key(folder, file)}"
