"""What a node and a directory tell a scraper, after things that are known to have happened."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from mooncake.metrics import Registry
from mooncake.store.api import PutResult, Store
from mooncake.store.instruments import instrument_directory, instrument_node
from mooncake.store.ssd import SsdConfig
from tests.store.helpers import TOKEN, eventually, keys, run, running_node
from tests.store.test_store_directory import cluster


def scraped(registry: Registry) -> dict[str, float]:
    """name{label=value,...} to number, of our own."""
    found = {}
    for family in text_string_to_metric_families(registry.render().decode()):
        assert family.documentation and family.type in ("gauge", "counter", "histogram"), family
        for name, labels, value, *_ in family.samples:
            if name.startswith("mooncake_"):
                text = ",".join(f"{label}={labels[label]}" for label in sorted(labels))
                found[name.removeprefix("mooncake_") + (f"{{{text}}}" if text else "")] = value
    return found


def test_a_node_tells_what_it_has_done() -> None:
    async def main() -> None:
        ask = asyncio.to_thread
        async with running_node(quotas={"alice": 300_000}, alignment=4096) as node:
            registry = Registry()
            instrument_node(registry, node)
            near = await ask(lambda: Store.connect(node.addresses[:1], token=TOKEN))
            far = await ask(lambda: Store.connect(node.addresses[1:], token=TOKEN, tenant="alice"))
            data = [b"1" * 100_000] * 2
            assert await ask(near.put_batch, keys(1, 2), data) == [PutResult.STORED] * 2
            assert await ask(far.put_batch, keys(3, 4), data) == [PutResult.STORED] * 2
            assert await ask(near.get_batch, keys(1, 3)) == data
            assert await ask(far.get_batch, keys(1, 9)) != data
            assert (
                await ask(far.put_batch, keys(5, 6, 7, 8), data * 2) == [PutResult.STORED] * 2 + [PutResult.REFUSED] * 2
            )
            assert await ask(near.remove, keys(1)[0])
            await ask(node._take_uses)
            found = scraped(registry)
            page = -(-100_000 // 4096) * 4096
            expected = {
                "store_capacity_bytes{tier=dram}": 1 << 20,
                "store_used_bytes{tier=dram}": 3 * page,
                "store_objects{tier=dram}": 3,
                "store_hits_total{tier=dram}": 3,
                "store_local_hits_total": 2,
                "store_misses_total": 1,
                "store_commits_total": 6,
                "store_committed_bytes_total": 600_000,
                "store_evictions_total{cause=quota,tier=dram}": 2,
                "store_evictions_total{cause=removed,tier=dram}": 1,
                "store_evictions_total{cause=room,tier=dram}": 0,
                "store_transfer_bytes_total{direction=read,path=shm}": 200_000,
                "store_transfer_bytes_total{direction=write,path=shm}": 200_000,
                "store_transfer_bytes_total{direction=read,path=socket}": 100_000,
                "store_transfer_bytes_total{direction=write,path=socket}": 400_000,
                "store_leases": 0,
                "store_clients": 2,
                "store_local_readers": 1,
                "store_errors_total{kind=refused}": 2,
                "store_errors_total{kind=damaged}": 0,
                "store_tenant_used_bytes{tenant=alice}": 2 * page,
                "store_tenant_quota_bytes{tenant=alice}": 300_000,
                "store_tenant_refusals_total{tenant=alice}": 2,
            }
            assert {name: found[name] for name in expected} == expected
            assert 0 < found["store_transfer_seconds_total{direction=write,path=socket}"] < 10
            await ask(near.close)
            await ask(far.close)
            await eventually(lambda: scraped(registry)["store_clients"] == 0)
            after = scraped(registry)["store_transfer_bytes_total{direction=write,path=socket}"]
            assert after == 400_000, "what ended connections have moved goes on to count"

    run(main())


def test_a_node_with_an_ssd_tells_of_both_tiers(tmp_path: Path) -> None:
    async def main() -> None:
        ask = asyncio.to_thread
        ssd = SsdConfig(64 << 20, extent_bytes=1 << 20)
        async with running_node(alignment=4096, capacity_bytes=1 << 20, ssd=ssd, ssd_dir=str(tmp_path)) as node:
            registry = Registry()
            instrument_node(registry, node)
            store = await ask(lambda: Store.connect(node.addresses[1:], token=TOKEN))
            for number in range(40):
                await ask(store.put, keys(number)[0], bytes([number]) * 100_000)
            assert await ask(store.get, keys(0)[0]) == bytes(100_000)
            await eventually(lambda: scraped(registry)["store_transfer_bytes_total{direction=write,path=ssd}"] > 0)
            found = scraped(registry)
            assert found["store_hits_total{tier=ssd}"] == 1 and found["store_hits_total{tier=dram}"] == 0
            assert found["store_objects{tier=ssd}"] > 20 and found["store_capacity_bytes{tier=ssd}"] >= 60 << 20
            assert found["store_evictions_total{cause=room,tier=dram}"] > 20
            assert found["store_transfer_bytes_total{direction=read,path=ssd}"] == 100_000
            assert found["store_transfer_seconds_total{direction=read,path=ssd}"] > 0
            await ask(store.close)

    run(main())


def test_a_directory_tells_what_it_knows() -> None:
    async def main() -> None:
        async with cluster("a", "b") as nodes:
            registry = Registry()
            instrument_directory(registry, nodes.server.core)
            store = await asyncio.to_thread(nodes.client, "a")
            await asyncio.to_thread(store.put_batch, keys(1, 2, 3), [b"1"] * 3, replicas=2)
            assert await asyncio.to_thread(store.replicate, keys(1, 2, 3), 2) == [2] * 3
            found = scraped(registry)
            assert (found["directory_nodes"], found["directory_objects"], found["directory_wanted"]) == (2, 3, 3)
            assert found["directory_short"] == 0 and found["directory_copies_asked_total"] >= 3
            assert found["directory_reported_total"] >= 6 and found["directory_lookups_total"] >= 3
            await asyncio.to_thread(store.close)

    run(main())
