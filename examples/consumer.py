"""Prints crashes as they happen and where their files went: python consumer.py [NATS_URL]

On a secured bus, such as that of compose.yaml, CRASHBUS_NATS_NKEY_FILE names the key.
"""

import asyncio
import os
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
    async with crashbus.connect(url, nkeys_seed=os.environ.get("CRASHBUS_NATS_NKEY_FILE")) as bus:
        await asyncio.gather(signals(bus), receipts(bus))


try:
    asyncio.run(main(*sys.argv[1:]))
except crashbus.CrashbusError as error:
    sys.exit(f"consumer: {error}")
