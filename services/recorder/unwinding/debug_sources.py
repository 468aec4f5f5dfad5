"""Where debug information of a build may be had: URLs for the process that fetches it.

A bucket that shippers deliver to has it as ``build-id/<xx>/<rest>/debuginfo``. For it a URL is
signed here, good for one object and a few minutes, so that the process which talks to the network
gets no key.
"""

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from crashbus import destination, layout
from crashbus.layout import Kind

if TYPE_CHECKING:
    from minio import Minio

_SIGNED_FOR = timedelta(minutes=15)  # more than any deadline for one crash needs, and clocks differ


@dataclass(frozen=True)
class S3:
    """The server of all buckets; without keys they are read as anybody may."""

    endpoint: str = "https://s3.amazonaws.com"
    region: str = "us-east-1"
    access_key: str | None = None
    secret_key: str | None = None


class Sources:
    """Debuginfod servers and buckets, in the order in which they are asked.

    Args:
        places: ``http(s)://…`` of servers, ``s3://bucket/prefix`` of buckets.
    """

    def __init__(self, places: tuple[str, ...], s3: S3 | None = None) -> None:
        self._places = places
        self._s3 = s3 or S3()

    def __bool__(self) -> bool:
        return bool(self._places)

    def urls(self, build_id: str) -> tuple[str, ...]:
        """Return where to ask for the debug information of a build."""
        return tuple(self._url(place, build_id) for place in self._places)

    def _url(self, place: str, build_id: str) -> str:
        if not place.startswith("s3://"):
            return f"{place.rstrip('/')}/buildid/{build_id}/debuginfo"
        bucket = destination.parse(place)
        key = layout.binary_key(Kind.DEBUGINFO, build_id)
        name = f"{bucket.prefix}/{key}" if bucket.prefix else key
        return self._client.presigned_get_object(bucket.bucket, name, _SIGNED_FOR)

    @cached_property
    def _client(self) -> "Minio":
        # Only here: who has no bucket need not have it in memory.
        from minio import Minio

        server = urlsplit(self._s3.endpoint)
        return Minio(
            server.netloc,
            self._s3.access_key,
            self._s3.secret_key,
            secure=server.scheme == "https",
            region=self._s3.region,  # known, it is not asked for
        )
