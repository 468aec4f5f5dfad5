"""The S3 calls we use, one HTTP request each, none repeated behind our back.

minio's calls for single parts are private names. All of them are used here and nowhere else, and
the package's minor version is fixed.
"""

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from minio import Minio
from minio.datatypes import Part as MinioPart
from minio.error import InvalidResponseError, S3Error

from services.common.settings import SettingsError
from services.shipper.destinations.s3_failures import FINAL, PASSING
from services.shipper.destinations.s3_resume import Part
from services.shipper.settings import ShipperSettings

_KEPT_CONNECTIONS = 64
_NOT_UNDERSTOOD = (400, 405, 501)  # HTTP statuses, RFC 9110


@dataclass(frozen=True)
class Stat:
    """What the server says of an object.

    Attributes:
        etag: without quotes.
        headers: with keys in lower case.
    """

    size: int
    etag: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Begun:
    """A multipart upload that was neither completed nor aborted.

    Attributes:
        time: when it was begun, in Unix seconds by the server's clock.
    """

    key: str
    upload: str
    time: float


class S3Api:
    """Calls to one S3 server.

    Every call raises what minio and urllib3 raise; see `s3_failures`.
    """

    def __init__(self, settings: ShipperSettings) -> None:
        if settings.s3_access_key is None or settings.s3_secret_key is None:
            raise SettingsError(
                "an s3:// destination needs CRASHBUS_SHIPPER_S3_ACCESS_KEY and "
                "CRASHBUS_SHIPPER_S3_SECRET_KEY (or the same with _FILE, naming files)"
            )
        self._knows_conditions = True  # until it says otherwise
        scheme, _, address = settings.s3_endpoint.partition("://")
        try:
            self._client: Any = Minio(
                address,
                access_key=settings.s3_access_key.get_secret_value(),
                secret_key=settings.s3_secret_key.get_secret_value(),
                secure=scheme == "https",
                region=settings.s3_region,
                http_client=_http_client(settings),
            )
        except ValueError as error:
            raise SettingsError(
                f"CRASHBUS_SHIPPER_S3_ENDPOINT or _S3_REGION: {error} "
                f"(given: {settings.s3_endpoint!r}, {settings.s3_region!r})"
            ) from None

    def bucket_exists(self, bucket: str) -> bool:
        """Tell whether there is such a bucket."""
        return bool(self._client.bucket_exists(bucket))

    def make_bucket(self, bucket: str) -> None:
        """Make a bucket in the configured region."""
        self._client.make_bucket(bucket)

    def put(
        self, bucket: str, key: str, data: memoryview, md5: bytes, headers: Mapping[str, str]
    ) -> None:
        """Write a whole object."""
        self._client._put_object(bucket, key, data, {**headers, **_md5_header(md5)})

    def put_if_free(
        self, bucket: str, key: str, data: memoryview, md5: bytes, headers: Mapping[str, str]
    ) -> None:
        """Write a whole object where there is none; on a server that cannot tell, anyway."""
        self._if_free(lambda more: self.put(bucket, key, data, md5, {**headers, **more}))

    def begin(self, bucket: str, key: str, headers: Mapping[str, str]) -> str:
        """Begin a multipart upload and return its ID."""
        return str(self._client._create_multipart_upload(bucket, key, dict(headers)))

    def put_part(
        self, bucket: str, key: str, upload: str, number: int, data: memoryview, md5: bytes
    ) -> str:
        """Write one part (numbers begin with 1) and return its ETag."""
        headers = _md5_header(md5)
        return str(self._client._upload_part(bucket, key, data, headers, upload, number))

    def parts(self, bucket: str, key: str, upload: str) -> list[Part]:
        """Return the parts of an unfinished upload that the server has, in order."""
        return [
            Part(one.part_number, one.size or 0, one.etag)
            for one in self._parts(bucket, key, upload)
        ]

    def latest_part(self, bucket: str, key: str, upload: str) -> float | None:
        """Return when the newest part of an unfinished upload came, in Unix seconds."""
        came = (one.last_modified for one in self._parts(bucket, key, upload))
        return max((time.timestamp() for time in came if time), default=None)

    def _parts(self, bucket: str, key: str, upload: str) -> Iterator[MinioPart]:
        marker = None
        while True:
            page = self._client._list_parts(bucket, key, upload, part_number_marker=marker)
            yield from page.parts
            if not page.is_truncated or page.next_part_number_marker in (None, marker):
                return
            marker = page.next_part_number_marker

    def complete(self, bucket: str, key: str, upload: str, etags: list[str]) -> None:
        """Make the parts an object."""
        self._complete(bucket, key, upload, etags, {})

    def complete_if_free(self, bucket: str, key: str, upload: str, etags: list[str]) -> None:
        """Do so where there is none; on a server that cannot tell, anyway."""
        self._if_free(lambda more: self._complete(bucket, key, upload, etags, more))

    def _complete(
        self, bucket: str, key: str, upload: str, etags: list[str], more: Mapping[str, str]
    ) -> None:
        parts = [MinioPart(number, etag) for number, etag in enumerate(etags, start=1)]
        self._client._complete_multipart_upload(bucket, key, upload, parts, _Headers(more))

    def _if_free(self, call: Callable[[Mapping[str, str]], None]) -> None:
        """Make a call that shall replace no object, with what tells the server so."""
        if self._knows_conditions:
            try:
                call({"If-None-Match": "*"})
                return
            except (S3Error, InvalidResponseError) as error:
                if not _may_know_no_conditions(error):
                    raise
        call({})
        self._knows_conditions = False

    def abort(self, bucket: str, key: str, upload: str) -> None:
        """Remove an unfinished upload with its parts."""
        self._client._abort_multipart_upload(bucket, key, upload)

    def unfinished(self, bucket: str, key: str) -> list[str]:
        """Return the IDs of unfinished uploads to exactly this key."""
        return [one.upload for one in self.all_unfinished(bucket, key) if one.key == key]

    def all_unfinished(self, bucket: str, prefix: str) -> Iterator[Begun]:
        """Yield the unfinished uploads to all keys that begin with a prefix."""
        key, upload = None, None
        while True:
            page = self._client._list_multipart_uploads(
                bucket, prefix=prefix, key_marker=key, upload_id_marker=upload
            )
            for one in page.uploads:
                begun = one.initiated_time.timestamp() if one.initiated_time else 0.0
                yield Begun(str(one.object_name), str(one.upload_id), begun)
            after = page.next_key_marker, page.next_upload_id_marker
            if not page.is_truncated or after in ((None, None), (key, upload)):
                return
            key, upload = after

    def stat(self, bucket: str, key: str) -> Stat:
        """Ask for an object's size, ETag and headers."""
        found = self._client.stat_object(bucket, key)
        headers = {str(name).lower(): str(value) for name, value in found.metadata.items()}
        return Stat(int(found.size), str(found.etag), headers)


@dataclass(frozen=True)
class _Headers:
    """Further headers of a call that minio lets have only those of an encryption key."""

    more: Mapping[str, str]

    def headers(self) -> Mapping[str, str]:
        return self.more


def _may_know_no_conditions(error: S3Error | InvalidResponseError) -> bool:
    """Tell whether a server may have refused a header that it does not know."""
    if isinstance(error, InvalidResponseError):  # a proxy's, or one without XML
        return error._code in _NOT_UNDERSTOOD
    known = error.code in FINAL or error.code in PASSING
    return error.response.status in _NOT_UNDERSTOOD and not known


def _http_client(settings: ShipperSettings) -> urllib3.PoolManager:
    ca_file = settings.s3_ca_file
    if ca_file is not None and not Path(ca_file).is_file():
        raise SettingsError(f"CRASHBUS_SHIPPER_S3_CA_FILE names {ca_file}, which is no file")
    return urllib3.PoolManager(
        maxsize=_KEPT_CONNECTIONS,
        timeout=urllib3.Timeout(connect=settings.s3_connect_timeout, read=settings.s3_read_timeout),
        # False: nothing is tried again and no redirect followed; errors come as they are.
        retries=urllib3.Retry(total=False),
        cert_reqs="CERT_REQUIRED",
        ca_certs=str(ca_file) if ca_file else None,
    )


def _md5_header(digest: bytes) -> dict[str, str]:
    return {"Content-MD5": b64encode(digest).decode()}
