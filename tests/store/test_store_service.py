"""What a store node tells the Conductor beside its blocks."""

from __future__ import annotations

import asyncio

from mooncake.core.types import TierLoad
from mooncake.store.api import PutResult, Store
from mooncake.store.service import node_load
from tests.store.helpers import TOKEN, keys, run, running_node


def test_a_node_tells_how_full_its_tiers_are() -> None:
    async def main() -> None:
        ask = asyncio.to_thread
        async with running_node(alignment=4096) as node:
            assert node_load(node).tiers == (TierLoad("dram", 1 << 20, 0, 0),)
            store = await ask(lambda: Store.connect(node.addresses[:1], token=TOKEN))
            assert await ask(store.put_batch, keys(1, 2), [b"1" * 5000] * 2) == [PutResult.STORED] * 2
            load = node_load(node)
            assert (load.name, load.epoch) == (node.config.node, node.epoch)
            [tier] = load.tiers
            await ask(store.close)
            assert (tier.tier, tier.capacity_bytes, tier.num_objects) == ("dram", 1 << 20, 2)
            assert 4 * 4096 <= tier.used_bytes <= 16 * 4096, "two pages each, and what was granted ahead of puts"

    run(main())
