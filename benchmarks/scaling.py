"""How much faster more shippers are where the destination answers late.

A proxy lets each answer of the S3 server wait for 200 ms. All work lies on the bus before the
shippers may take it::

    .venv/bin/python -m benchmarks.scaling [crashes]
"""

import asyncio
import sys
import time
from random import Random

from benchmarks import pipeline
from benchmarks.pipeline import WITHIN, plot, seconds, table
from crashbus import streams
from tests.faults.crashes import core_pieces, write_set
from tests.support.proxy import Proxy
from tests.support.s3 import S3Server
from tests.support.wait import until

SHIPPERS = (1, 2, 4, 8)
LATENCY = 0.2  # seconds
FILES = 6  # of each crash, before its manifest.json


def main() -> None:
    crashes = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    with pipeline.s3_server() as s3:
        asyncio.run(measure(s3, crashes))


async def measure(s3: S3Server, crashes: int) -> None:
    way = Proxy(s3.port)
    way.latency = LATENCY
    took = {count: await drain(s3, way.port, count, crashes) for count in SHIPPERS}
    way.close()
    table(
        ("shippers", "s", "files a second", "times one shipper"),
        [
            (count, f"{one:.1f}", f"{crashes * FILES / one:.0f}", f"{took[1] / one:.2f}")
            for count, one in took.items()
        ],
    )
    plot([(str(count), took[1] / one) for count, one in took.items()], "times one")


async def drain(s3: S3Server, port: int, shippers: int, crashes: int) -> float:
    """Return the seconds until the files of so many small crashes are delivered."""
    async with pipeline.running(s3, shippers=shippers, s3_port=port, proxied=True) as running:
        running.shipper_way.silence()
        random = Random(shippers)
        for _ in range(crashes):
            write_set(running.spool, pipeline.HOST, core_pieces(4096, random), random)

        async def queued() -> bool:
            info = await running.bus._js.stream_info(streams.FILES)
            return info.state.messages >= crashes * FILES

        async def delivered() -> bool:
            info = await running.bus._js.stream_info(streams.RECEIPTS)
            return info.state.messages >= crashes * FILES

        await until(queued, WITHIN, every=0.1)
        started = time.monotonic()
        running.shipper_way.restore()
        await until(delivered, WITHIN, every=0.05)
        return seconds(started)


if __name__ == "__main__":
    main()
