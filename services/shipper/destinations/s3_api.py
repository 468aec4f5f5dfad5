"""The S3 calls we use, one HTTP request each, none repeated behind our back.

minio's calls for single parts are private names. All of them are used here and nowhere else, and
the package's minor version is fixed.
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from minio import Minio
from minio.datatypes import Part

from services.common.settings import SettingsError
from services.shipper.settings import ShipperSettings

_KEPT_CONNECTIONS = 64


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

    def put(self, bucket: str, key: str, data: bytearray, headers: Mapping[str, str]) -> None:
        """Write a whole object."""
        self._client._put_object(bucket, key, data, {**headers, **_md5_header(data)})

    def begin(self, bucket: str, key: str, headers: Mapping[str, str]) -> str:
        """Begin a multipart upload and return its ID."""
        return str(self._client._create_multipart_upload(bucket, key, dict(headers)))

    def put_part(self, bucket: str, key: str, upload: str, number: int, data: bytearray) -> str:
        """Write one part (numbers begin with 1) and return its ETag."""
        headers = _md5_header(data)
        return str(self._client._upload_part(bucket, key, data, headers, upload, number))

    def complete(self, bucket: str, key: str, upload: str, etags: list[str]) -> None:
        """Make the parts an object."""
        parts = [Part(number, etag) for number, etag in enumerate(etags, start=1)]
        self._client._complete_multipart_upload(bucket, key, upload, parts)

    def abort(self, bucket: str, key: str, upload: str) -> None:
        """Remove an unfinished upload with its parts."""
        self._client._abort_multipart_upload(bucket, key, upload)

    def unfinished(self, bucket: str, key: str) -> list[str]:
        """Return the IDs of unfinished uploads to exactly this key, at most 1,000."""
        found = self._client._list_multipart_uploads(bucket, prefix=key)
        return [str(one.upload_id) for one in found.uploads if one.object_name == key]

    def stat(self, bucket: str, key: str) -> Stat:
        """Ask for an object's size, ETag and headers."""
        found = self._client.stat_object(bucket, key)
        headers = {str(name).lower(): str(value) for name, value in found.metadata.items()}
        return Stat(int(found.size), str(found.etag), headers)


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


def _md5_header(data: bytearray) -> dict[str, str]:
    digest = hashlib.md5(data, usedforsecurity=False).digest()
    return {"Content-MD5": b64encode(digest).decode()}
