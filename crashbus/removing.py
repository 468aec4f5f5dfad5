"""Removing messages from a stream by their subject.

A nats-server before 2.9.15 goes on counting as stored what is purged by subject, until it takes
nothing from anybody though its streams are empty (nats-server, pull request 3876). What is deleted
message by message it counts right.
"""

import asyncio
import json
import re

from nats.aio.client import ServerVersion
from nats.js import JetStreamContext
from nats.js.errors import APIError, NotFoundError

_COUNTS_PURGES = (2, 9, 15)
_AT_ONCE = 16  # requests; one by one each would wait for the server
_DELETES = re.compile(r"(direct|msg)\.(get|delete)\.crash_(chunks|small|files)", re.IGNORECASE)
_GONE = {10037, 10043, 10057}  # error codes: no such message, or somebody else removed it


def counts_purges(server: ServerVersion) -> bool:
    """Tell whether a server takes off its count what is purged by subject."""
    return (server.major, server.minor, server.patch) >= _COUNTS_PURGES


def mend(server: ServerVersion, refusal: str) -> str | None:
    """Return what to permit, if a server refused what only one that counts wrong is asked for."""
    if counts_purges(server) or not _DELETES.search(refusal):
        return None
    version = f"{server.major}.{server.minor}.{server.patch}"
    return (
        f"nats-server {version} needs the lines that deploy/nats/nats.conf has for servers before "
        "2.9.15, or be replaced by a newer one; until then nothing that was delivered is removed "
        "from the bus"
    )


async def remove(js: JetStreamContext, server: ServerVersion, stream: str, subject: str) -> None:
    """Remove all messages of a subject, which may hold wildcards.

    Raises NATS's own errors.
    """
    if counts_purges(server):
        await js.purge_stream(stream, subject=subject)
        return
    there = await js.stream_info(stream, subjects_filter=subject)
    # Three times as fast, but a server may answer that has not got all of them yet.
    direct = bool(there.config.allow_direct) and there.config.num_replicas == 1
    found = [0] if there.state.subjects else []
    while found:
        found = await _following(js, stream, subject, found[-1], direct)
        deleted = await asyncio.gather(
            *(_delete(js, stream, one) for one in found), return_exceptions=True
        )
        for result in deleted:
            if result is not None:
                raise result


async def _following(
    js: JetStreamContext, stream: str, subject: str, sequence: int, direct: bool
) -> list[int]:
    """Return the sequences of some messages behind one, in order; none where there are no more."""
    found: list[int] = []
    while len(found) < _AT_ONCE:
        try:
            message = await js.get_msg(
                stream, seq=sequence + 1, subject=subject, direct=direct, next=True
            )
        except NotFoundError as error:
            if error.err_code not in (None, *_GONE):
                raise
            break
        assert message.seq is not None
        sequence = message.seq
        found.append(sequence)
    return found


async def _delete(js: JetStreamContext, stream: str, sequence: int) -> None:
    """Delete a message; its bytes are not written over, which is the server's default."""
    request = json.dumps({"seq": sequence, "no_erase": True}).encode()
    try:
        await js._api_request(f"{js._prefix}.STREAM.MSG.DELETE.{stream}", request)
    except APIError as error:
        if error.err_code not in _GONE:
            raise
