"""Faults of the S3 server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.faults.blow import Blow

OPEN = "requests open"


@asynccontextmanager
async def gateway_killed(blow: Blow) -> AsyncIterator[None]:
    await blow.reach(OPEN, blow.rig.s3_way.unanswered)
    async with blow.failing():
        blow.rig.s3.kill_gateway()
        yield
    await asyncio.to_thread(blow.rig.s3.start_gateway)


@asynccontextmanager
async def gateway_stopped(blow: Blow) -> AsyncIterator[None]:
    await blow.reach(OPEN, blow.rig.s3_way.unanswered)
    blow.rig.s3.pause_gateway()
    yield
    await blow.until("requests that waited", blow.rig.s3_way.unanswered)
    blow.rig.s3.resume_gateway()


@asynccontextmanager
async def store_stopped(blow: Blow) -> AsyncIterator[None]:
    """The gateway answers, but what it stores on does not."""
    await blow.reach(OPEN, blow.rig.s3_way.unanswered)
    with blow.rig.s3.store_paused():
        async with blow.failing():
            yield


@asynccontextmanager
async def slow_down(blow: Blow) -> AsyncIterator[None]:
    """The gateway takes one request at a time, and answers all others SlowDown."""
    s3 = blow.rig.s3
    s3.kill_gateway()
    await asyncio.to_thread(s3.start_gateway, "--rgw-max-concurrent-requests=1")
    async with blow.failing():
        yield
    s3.kill_gateway()
    await asyncio.to_thread(s3.start_gateway)


@asynccontextmanager
async def out_of_quota(blow: Blow) -> AsyncIterator[None]:
    admin, scope = blow.rig.s3.admin, ("--quota-scope=user", f"--uid={blow.rig.user}")
    await asyncio.to_thread(admin, "quota", "set", *scope, "--max-size=1024")
    await asyncio.to_thread(admin, "quota", "enable", *scope)
    async with blow.failing():
        yield
    await asyncio.to_thread(admin, "quota", "disable", *scope)


@asynccontextmanager
async def user_suspended(blow: Blow) -> AsyncIterator[None]:
    await asyncio.to_thread(blow.rig.s3.suspend, blow.rig.user)
    async with blow.failing():
        yield
    await asyncio.to_thread(blow.rig.s3.admin, "user", "enable", f"--uid={blow.rig.user}")
