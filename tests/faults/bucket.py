"""What lies at the destination, seen past the way that the shippers take to it."""

import asyncio
import hashlib
import json

import zstandard
from minio import Minio
from minio.deleteobjects import DeleteObject
from urllib3 import PoolManager, Retry, Timeout

from crashbus import Manifest, layout
from tests.faults.crashes import CrashSet
from tests.support.s3 import S3Server

PREFIX = "crashes"


class Bucket:
    """A bucket of a user's own."""

    def __init__(self, s3: S3Server, keys: tuple[str, str], name: str) -> None:
        self._address = s3.endpoint.removeprefix("http://")
        self._keys = keys
        self.name = name

    def make(self) -> None:
        Minio(self._address, *self._keys, secure=False, region="us-east-1").make_bucket(self.name)

    def _client(self) -> Minio:
        """Return a client that does not try again: we do that."""
        pool = PoolManager(timeout=Timeout(10, 90), retries=Retry(0))
        return Minio(self._address, *self._keys, secure=False, region="us-east-1", http_client=pool)

    def crashes(self) -> dict[str, list[str]]:
        """Return the objects of each crash, by its ID; every folder ends with one."""
        found: dict[str, list[str]] = {}
        for one in self._client().list_objects(self.name, f"{PREFIX}/", recursive=True):
            key = str(one.object_name)
            if f"/{layout.BINARIES}/" not in key:
                found.setdefault(key.split("/")[-2].rpartition("-")[2], []).append(key)
        return found

    async def look(self) -> dict[str, list[str]]:
        """Return the same; nothing where the server does not answer."""
        try:
            return await asyncio.to_thread(self.crashes)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is asked again
            print(f"the S3 server does not list: {error}")
            return {}

    def uploads(self) -> list[str]:
        """Return the objects whose uploads are not complete."""
        found = self._client()._list_multipart_uploads(self.name)
        return [str(one.object_name) for one in found.uploads]

    def check(self, crash: CrashSet, keys: list[str]) -> None:
        """See that a crash lies there bit for bit, and once."""
        found = {}
        for key in keys:
            name = key.rpartition("/")[2]
            content = self._read(key)
            if name == "manifest.json":
                listed = {file["name"]: file["sha256"] for file in json.loads(content)["files"]}
                assert listed == crash.sha256, f"{key} names other files"
            else:
                found[name.removesuffix(".zst")] = hashlib.sha256(content).hexdigest()
        assert found == crash.sha256, f"crash {crash.crash_id} is not what it was"
        assert len(keys) == len(crash.sha256) + 1, f"more than one delivery of it: {keys}"

    def manifest(self, keys: list[str]) -> Manifest:
        """Return the manifest of a crash with these objects."""
        (key,) = (key for key in keys if is_manifest(key))
        return Manifest.model_validate_json(self._read(key))

    def content(self, folder: str, name: str) -> bytes:
        """Return what a crash's file was before it was compressed."""
        return self._read(f"{PREFIX}/{folder}/{name}")

    def _read(self, key: str) -> bytes:
        answer = self._client().get_object(self.name, key)
        stored = bytes(answer.read())
        answer.release_conn()
        if not key.endswith(".zst"):
            return stored
        with zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True) as reader:
            return bytes(reader.read())

    def remove(self, folders: list[list[str]]) -> None:
        """Make room for the next crashes."""
        keys = [DeleteObject(key) for folder in folders for key in folder]
        assert not list(self._client().remove_objects(self.name, keys))


def is_manifest(key: str) -> bool:
    return key.endswith("/manifest.json")
