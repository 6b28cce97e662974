"""Run by vLLM's Python with a folder for sockets: our reader of KV events against vLLM's own publisher. Prints `right`."""

from __future__ import annotations

import asyncio
import sys
import time

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

from mooncake.engine.vllm.events import CachedBlocks, salt_of
from mooncake.engine.vllm.feed import EventFeed


async def main(folder: str) -> None:
    endpoints = f"ipc://{folder}/events", f"ipc://{folder}/replay"
    publisher = ZmqEventPublisher(0, endpoints[0], endpoints[1], buffer_steps=5)
    keys = [bytes([at]) * 16 for at in range(100)]
    told: dict[bytes, None] = {}

    def publish(*events: object) -> None:
        publisher.publish(KVEventBatch(ts=time.time(), events=list(events)))

    def block(at: int) -> BlockStored:
        """The first block of a sequence of its own, in one page."""
        return BlockStored([at], None, [at] * 8, 8, None, "GPU", None, extra_keys=[(salt_of(keys[at]),)])

    def changed(added: tuple[bytes, ...], removed: tuple[bytes, ...]) -> None:
        told.update(dict.fromkeys(added))
        for key in removed:
            del told[key]

    async def until(*expected: int) -> None:
        deadline = time.monotonic() + 10
        while list(told) != [keys[at] for at in expected]:
            assert time.monotonic() < deadline, f"expected {expected}, told {list(told)}"
            await asyncio.sleep(0.01)
        assert tuple(told) == feed.blocks.keys()

    for at in range(3):  # nobody listens yet
        publish(block(at))
    await asyncio.sleep(0.5)
    feed = EventFeed(*endpoints, CachedBlocks(8), changed)
    running = asyncio.create_task(feed.run())
    await asyncio.sleep(0.5)
    publish(block(3))
    await until(0, 1, 2, 3)
    publish(BlockRemoved([1], "GPU"))
    await until(0, 2, 3)

    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    for at in range(10, 20):  # more than the publisher keeps
        publish(block(at))
    await asyncio.sleep(0.5)
    late = EventFeed(*endpoints, feed.blocks, changed)
    late._order.next = 5
    running = asyncio.create_task(late.run())
    await asyncio.sleep(0.5)
    publish(block(20))
    await until(16, 17, 18, 19, 20)
    publish(AllBlocksCleared())
    await until()
    running.cancel()
    publisher.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
    print("right")
