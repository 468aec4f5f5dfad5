"""What S3's errors mean, without a server. What a real one answers is in test_s3."""

import ssl
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest
import urllib3.exceptions as http
from minio.error import InvalidResponseError, S3Error, ServerError
from urllib3 import HTTPResponse

from services.shipper.destinations.s3_api import S3Api, Stat
from services.shipper.destinations.s3_failures import as_failure, failure_of
from services.shipper.destinations.s3_upload import META_SHA256, mismatch
from services.shipper.failure import Failure, Final, Passing
from services.shipper.settings import ShipperSettings


def s3_error(code: str, status: int) -> S3Error:
    return S3Error(HTTPResponse(status=status), code, "said the server", "/b/k", "1", "2")


@pytest.mark.parametrize(
    ("code", "status", "kind", "reason"),
    [
        ("AccessDenied", 403, Final, "access_denied"),
        ("InvalidAccessKeyId", 403, Final, "unknown_access_key"),
        ("SignatureDoesNotMatch", 403, Final, "wrong_secret_key"),
        ("NoSuchBucket", 404, Final, "no_such_bucket"),
        ("UserSuspended", 403, Final, "user_suspended"),
        ("AuthorizationHeaderMalformed", 400, Final, "wrong_region"),
        ("SomethingNew", 400, Final, "refused_by_server"),
        ("PreconditionFailed", 412, Passing, "name_taken"),
        ("QuotaExceeded", 403, Passing, "quota_exceeded"),
        ("SlowDown", 503, Passing, "slow_down"),
        ("InternalError", 500, Passing, "server_error"),
        ("SomethingNew", 503, Passing, "server_error"),
        ("SomethingNew", 429, Passing, "server_error"),
        ("NoSuchUpload", 404, Passing, "upload_vanished"),
        ("BadDigest", 400, Passing, "damaged_on_the_way"),
        ("RequestTimeTooSkewed", 403, Passing, "clock_skew"),
    ],
)
def test_code_tells_whether_another_try_can_succeed(
    code: str, status: int, kind: type, reason: str
) -> None:
    failure = failure_of(s3_error(code, status), "s3://b/k")

    assert (type(failure), failure.reason) == (kind, reason)
    assert failure.mend
    assert "s3://b/k" in str(failure)
    assert "said the server" in str(failure)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (InvalidResponseError(502, "text/html", "<html>" * 1000), Passing, "server_error"),
        (InvalidResponseError(404, "text/html", "nginx"), Final, "refused_by_server"),
        (ServerError("server failed", 503), Passing, "server_error"),
        (http.NewConnectionError(None, "refused"), Passing, "refused"),  # type: ignore[arg-type]
        (http.NameResolutionError("h", None, OSError("?")), Passing, "unknown_host"),  # type: ignore[arg-type]
        (http.ReadTimeoutError(None, "/", "slow"), Passing, "timeout"),  # type: ignore[arg-type]
        (http.ConnectTimeoutError(None, "slow"), Passing, "timeout"),
        (http.ProtocolError("aborted"), Passing, "connection_lost"),
        (http.SSLError(ssl.SSLCertVerificationError("self-signed")), Final, "certificate_rejected"),
        (http.SSLError(ssl.SSLError("wrong version number")), Passing, "tls_failed"),
        (ET.ParseError("not well-formed"), Passing, "bad_answer"),
        (ConnectionResetError(104, "reset"), Passing, "connection_lost"),
    ],
)
def test_broken_connection_or_answer_is_told_apart(
    error: Exception, kind: type[Failure], reason: str
) -> None:
    with pytest.raises(kind) as caught, as_failure("s3://b/k"):
        raise error

    assert caught.value.reason == reason
    assert len(str(caught.value)) < 1000


SHA256, MD5 = "a" * 64, "b" * 32


def stat(size: int = 5, etag: str = MD5, **headers: str) -> Stat:
    return Stat(
        size, etag, {META_SHA256: SHA256} | {k.replace("_", "-"): v for k, v in headers.items()}
    )


def test_object_is_what_was_written() -> None:
    assert mismatch(stat(), 5, MD5, SHA256) is None


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        (stat(size=4), "4 bytes"),
        (stat(etag="c" * 32), "ETag"),
        (stat(etag=f"{'c' * 32}-2"), "ETag"),
        (Stat(5, MD5, {META_SHA256: "d" * 64}), "another file"),
    ],
)
def test_object_of_others_is_noticed(found: Stat, wrong: str) -> None:
    assert wrong in str(mismatch(found, 5, MD5, SHA256))


def test_etag_that_is_no_md5_says_nothing() -> None:
    assert mismatch(stat(etag=""), 5, MD5, SHA256) is None
    assert mismatch(stat(etag="opaque"), 5, MD5, SHA256) is None
    kms = stat(etag="c" * 32, x_amz_server_side_encryption="aws:kms")
    assert mismatch(kms, 5, MD5, SHA256) is None


class Refusing:
    """Stands in for the requests of an API; refuses those with a condition."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.api = S3Api(ShipperSettings(s3_access_key="key", s3_secret_key="secret"))
        self.conditions: list[str | None] = []
        self._error = error
        monkeypatch.setattr(self.api._client, "_execute", self._execute)

    def _execute(self, *_: object, headers: dict[str, str], **__: object) -> HTTPResponse:
        self.conditions.append(headers.get("If-None-Match"))
        if self.conditions[-1] is not None:
            raise self._error
        return HTTPResponse(body=b"<CompleteMultipartUploadResult/>", status=200)

    def put(self) -> None:
        self.api.put_if_free("bucket", "key", memoryview(b"x"), b"md5", {"a": "b"})

    def complete(self) -> None:
        self.api.complete_if_free("bucket", "key", "upload", ["etag"])


@pytest.mark.parametrize(
    "error",
    [
        s3_error("NotImplemented", 501),
        s3_error("InvalidArgument", 400),
        s3_error("MethodNotAllowed", 405),
        InvalidResponseError(501, "text/html", "<html>"),
    ],
)
@pytest.mark.parametrize("call", [Refusing.put, Refusing.complete])
def test_server_that_knows_no_condition_is_asked_without_from_then_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception, call: Callable[[Refusing], None]
) -> None:
    server = Refusing(monkeypatch, error)

    call(server)
    call(server)

    assert server.conditions == ["*", None, None]


@pytest.mark.parametrize(
    "error",
    [
        s3_error("PreconditionFailed", 412),
        s3_error("BadDigest", 400),
        s3_error("InternalError", 500),
        InvalidResponseError(502, "text/html", "<html>"),
    ],
)
@pytest.mark.parametrize("call", [Refusing.put, Refusing.complete])
def test_condition_is_not_dropped_for_another_failure(
    monkeypatch: pytest.MonkeyPatch, error: Exception, call: Callable[[Refusing], None]
) -> None:
    server = Refusing(monkeypatch, error)

    with pytest.raises(type(error)):
        call(server)

    assert server.conditions == ["*"]
