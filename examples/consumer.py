"""Prints crashes as they happen and where their files went: python consumer.py [NATS_URL]"""

import asyncio
import sys

import crashbus


async def signals(bus: crashbus.Bus) -> None:
    async for event in bus.subscribe(crashbus.SignalEvent):
        fate = "dies of" if event.fatal else "handles"
        print(event.crash_id, event.host, event.process.comm, fate, event.signal_name, flush=True)


async def receipts(bus: crashbus.Bus) -> None:
    async for receipt in bus.subscribe(crashbus.Receipt):
        print(receipt.crash_id, receipt.url, receipt.file.sha256, flush=True)


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with crashbus.connect(url) as bus:
        await asyncio.gather(signals(bus), receipts(bus))


asyncio.run(main(*sys.argv[1:]))
