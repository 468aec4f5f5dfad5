"""Reading crashes back from an S3 bucket, through minio's public methods alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error
from urllib3.exceptions import HTTPError

from crashbus.cli.store import NotThere, Readable, Store, StoreError
from crashbus.destination import Destination
from services.shipper.settings import ShipperSettings

# What helps against errors of S3: docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_KEYS = "check CRASHBUS_SHIPPER_S3_ACCESS_KEY and CRASHBUS_SHIPPER_S3_SECRET_KEY (or ..._FILE)"
_MENDS = {
    "NoSuchBucket": "check the bucket's name, or make it",
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "AccessDenied": f"{_KEYS}, and that they may list and read the bucket",
    "RequestTimeTooSkewed": "set this host's clock",
    "AuthorizationHeaderMalformed": "check CRASHBUS_SHIPPER_S3_REGION",
}


class S3Store(Store):
    """``s3://bucket/prefix``: a bucket, with the shipper's settings for server and keys."""

    def __init__(self, parsed: Destination) -> None:
        super().__init__(parsed.url)
        settings = ShipperSettings.load()
        self._bucket = parsed.bucket
        self._prefix = f"{parsed.prefix}/" if parsed.prefix else ""
        self._endpoint = settings.s3_endpoint
        self._client = _client(settings)

    @contextmanager
    def open(self, key: str) -> Iterator[Readable]:
        with self._as_store_errors(key):
            response = self._client.get_object(self._bucket, self._prefix + key)
            try:
                yield response
            finally:
                response.close()
                response.release_conn()

    def _folders(self, below: str) -> list[str]:
        prefix = self._prefix + below
        with self._as_store_errors(below):
            listed = list(self._client.list_objects(self._bucket, prefix=prefix))
        names_ = (one.object_name or "" for one in listed if one.is_dir)
        return [name.removeprefix(prefix).rstrip("/") for name in names_]

    @contextmanager
    def _as_store_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject"):
                raise NotThere(f"{self.url} has no {key}", "take another destination") from error
            raise StoreError(
                f"{self.url}: {error.code} {error.message or ''}".rstrip(),
                _MENDS.get(str(error.code), "see what the S3 server's log says"),
            ) from error
        except (MinioException, HTTPError, OSError) as error:
            cause = getattr(error, "reason", None) or error  # urllib3 wraps it in its retries
            raise StoreError(
                f"{self.url}: {self._endpoint} does not answer: {cause}",
                "start the S3 server, or set CRASHBUS_SHIPPER_S3_ENDPOINT",
            ) from error


def _client(settings: ShipperSettings) -> Minio:
    """Return a client that gives up in time: a person is waiting."""
    scheme, _, place = settings.s3_endpoint.partition("://")
    access, secret = settings.s3_access_key, settings.s3_secret_key
    http = urllib3.PoolManager(
        timeout=urllib3.Timeout(settings.s3_connect_timeout, settings.s3_read_timeout),
        retries=urllib3.Retry(2, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504)),
        cert_reqs="CERT_REQUIRED",
        ca_certs=str(settings.s3_ca_file) if settings.s3_ca_file else None,
    )
    try:
        return Minio(
            place,
            access_key=access.get_secret_value() if access else None,
            secret_key=secret.get_secret_value() if secret else None,
            secure=scheme == "https",
            region=settings.s3_region,
            http_client=http,
        )
    except ValueError as error:
        raise StoreError(
            f"S3 server {settings.s3_endpoint!r}, region {settings.s3_region!r}: {error}",
            "correct CRASHBUS_SHIPPER_S3_ENDPOINT or _S3_REGION",
        ) from None
