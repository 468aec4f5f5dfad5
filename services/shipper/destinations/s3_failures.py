"""What S3's errors mean: which can pass by themselves, which cannot, and what mends them.

Codes are from https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html and from
Ceph's src/rgw/rgw_common.cc.
"""

import ssl
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager

import urllib3.exceptions as http
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from services.shipper.failure import Failure, Final, Passing

MAX_ERROR = 500  # characters of what a server says

_KEYS = "CRASHBUS_SHIPPER_S3_ACCESS_KEY"
_SECRET = "CRASHBUS_SHIPPER_S3_SECRET_KEY"  # noqa: S105 - a variable's name
_REGION = "set CRASHBUS_SHIPPER_S3_REGION (and the endpoint) to where the bucket is"
_ALLOW = (
    "allow the key s3:PutObject, GetObject, ListBucket, ListBucketMultipartUploads, "
    "ListMultipartUploadParts and AbortMultipartUpload on the bucket, or use another key"
)

# What may not pass by itself, and what may: reason and mend, by code.
FINAL: dict[str, tuple[str, str]] = {
    "AccessDenied": ("access_denied", _ALLOW),
    "AllAccessDisabled": ("access_denied", _ALLOW),
    "AccountProblem": ("access_denied", "see what is wrong with the account"),
    "UserSuspended": ("user_suspended", "enable the user again"),
    "InvalidAccessKeyId": ("unknown_access_key", f"set {_KEYS} to a key of this server"),
    "SignatureDoesNotMatch": ("wrong_secret_key", f"set {_SECRET} to the one of the access key"),
    "ExpiredToken": ("expired_key", f"renew {_KEYS} and {_SECRET}"),
    "InvalidToken": ("expired_key", f"renew {_KEYS} and {_SECRET}"),
    "NoSuchBucket": (
        "no_such_bucket",
        "make the bucket, or set CRASHBUS_SHIPPER_S3_CREATE_BUCKET=true",
    ),
    "InvalidBucketName": ("no_such_bucket", "correct the bucket in CRASHBUS_DESTINATIONS"),
    "BucketAlreadyExists": ("bucket_of_another", "choose another bucket, this one is taken"),
    "TooManyBuckets": ("too_many_buckets", "raise the user's limit, or make the bucket yourself"),
    "PermanentRedirect": ("wrong_region", _REGION),
    "Redirect": ("wrong_region", _REGION),
    "AuthorizationHeaderMalformed": ("wrong_region", _REGION),
    "IllegalLocationConstraintException": ("wrong_region", _REGION),
    "InvalidLocationConstraint": ("wrong_region", _REGION),
    "KeyTooLongError": ("name_too_long", "shorten the prefix in CRASHBUS_DESTINATIONS"),
    "EntityTooLarge": ("file_too_large", "use a server that takes larger objects"),
}
PASSING: dict[str, tuple[str, str]] = {
    "SlowDown": ("slow_down", "see why the server is overloaded"),
    "ServiceUnavailable": ("server_unavailable", "see the server's log"),
    "InternalError": ("server_error", "see the server's log"),
    "RequestTimeout": ("timeout", "see what is slow between here and the server"),
    "RequestTimeTooSkewed": ("clock_skew", "set the clocks of this host and the server right"),
    "QuotaExceeded": ("quota_exceeded", "raise the quota, or make room in the bucket"),
    "BadDigest": ("damaged_on_the_way", "see what changes bytes between here and the server"),
    "XAmzContentSHA256Mismatch": (
        "damaged_on_the_way",
        "see what changes bytes between here and the server",
    ),
    "NoSuchUpload": ("upload_vanished", "nothing: it is begun anew"),
    "NoSuchKey": ("object_vanished", "see who removes objects from the bucket"),
    "OperationAborted": ("conflict", "nothing: it is tried again"),
    "PreconditionFailed": ("name_taken", "nothing: it is compared"),
    "ConditionalRequestConflict": ("name_taken", "nothing: it is compared"),
}
_PASSING_STATUS = frozenset({408, 409, 425, 429})


@contextmanager
def as_failure(place: str) -> Iterator[None]:
    """Turn whatever minio and urllib3 raise into a failure of this place."""
    try:
        yield
    except (MinioException, http.HTTPError, ET.ParseError, ValueError, OSError) as error:
        raise failure_of(error, place) from error


def failure_of(error: Exception, place: str) -> Failure:
    """Classify an error met at a place, such as ``s3://bucket/key``."""
    match error:
        case S3Error():
            return _of_code(str(error.code), error.response.status, str(error.message), place)
        case InvalidResponseError():
            return _of_status(error._code, f"{place}: {str(error)[:MAX_ERROR]}")
        case ServerError():
            return _of_status(error.status_code, f"{place}: {str(error)[:MAX_ERROR]}")
        case http.SSLError():
            return _of_tls(error, place)
        case http.NameResolutionError():
            mend = "correct CRASHBUS_SHIPPER_S3_ENDPOINT, or mend the name service"
            return Passing("unknown_host", f"{place}: {error}", mend)
        case http.NewConnectionError():
            mend = "start the S3 server, or correct CRASHBUS_SHIPPER_S3_ENDPOINT"
            return Passing("refused", f"{place}: {error}", mend)
        case http.TimeoutError() | TimeoutError():
            mend = "see why the S3 server does not answer"
            return Passing("timeout", f"{place}: {error}", mend)
        case http.HTTPError() | OSError():
            return Passing("connection_lost", f"{place}: {error}", "see the S3 server's log")
        case _:
            text = f"{place}: not an S3 answer: {type(error).__name__}: {str(error)[:MAX_ERROR]}"
            mend = "see whether CRASHBUS_SHIPPER_S3_ENDPOINT is an S3 server"
            return Passing("bad_answer", text, mend)


def _of_code(code: str, status: int, message: str, place: str) -> Failure:
    text = f"{place}: {code} (HTTP {status}): {message[:MAX_ERROR]}"
    if code in FINAL:
        return Final(FINAL[code][0], text, FINAL[code][1])
    if code in PASSING:
        return Passing(PASSING[code][0], text, PASSING[code][1])
    return _of_status(status, text)


def _of_status(status: int, text: str) -> Failure:
    if status >= 500 or status in _PASSING_STATUS:
        return Passing("server_error", text, "see the S3 server's log")
    mend = "see whether CRASHBUS_SHIPPER_S3_ENDPOINT is an S3 server, and what it says here"
    return Final("refused_by_server", text, mend)


def _of_tls(error: http.SSLError, place: str) -> Failure:
    cause = error.args[0] if error.args else None
    text = f"{place}: {error}"
    if isinstance(cause, ssl.SSLCertVerificationError):
        mend = "set CRASHBUS_SHIPPER_S3_CA_FILE to the CA that signed the server's certificate"
        return Final("certificate_rejected", text, mend)
    return Passing("tls_failed", text, "see whether the S3 server speaks TLS (https) there")
