"""Metrics of every process of a real cluster, as promtool and a real Prometheus see them."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.live.harness import Client, Cluster
from tests.live.prometheus import Prometheus, free_ports, programs

NUM_REQUESTS = 12
NUM_PROMPT, NUM_OUTPUT = 300, 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    first = free_ports(5)
    options = ("--simulated-hardware", "zero", "--store-memory", "64MiB", "--metrics-port", str(first))
    with Cluster("--engine", "simulated", *options) as made:
        yield made


@pytest.fixture(scope="module")
def addresses(cluster: Cluster) -> dict[str, str]:
    """Where each process is scraped."""
    names = ("node-0", "conductor", "prefill-0", "decode-0", "frontend-0")
    return {name: f"127.0.0.1:{cluster.config['metrics_port'] + at}" for at, name in enumerate(names)}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return programs(tmp_path_factory.mktemp("prometheus"))


def ask(cluster: Cluster) -> None:
    async def run() -> None:
        async with Client(cluster) as client:
            for at in range(NUM_REQUESTS):
                found = await client.complete([at % 3 + 1] * NUM_PROMPT, NUM_OUTPUT)
                assert not found.error

    asyncio.run(run())


def test_promtool_finds_nothing_wrong(cluster: Cluster, addresses: dict[str, str], tools: dict[str, str]) -> None:
    ask(cluster)
    for name, address in addresses.items():
        answer = httpx.get(f"http://{address}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        done = subprocess.run(
            [tools["promtool"], "check", "metrics"], input=answer.content, capture_output=True, timeout=20, check=False
        )
        assert (done.returncode, done.stderr.decode()) == (0, ""), f"{name}:\n{answer.text}"
        assert httpx.get(f"http://{address}/health").text == "ok\n"
        assert httpx.get(f"http://{address}/other").status_code == 404


def test_a_prometheus_has_all_of_them(
    cluster: Cluster, addresses: dict[str, str], tools: dict[str, str], tmp_path: Path
) -> None:
    ask(cluster)
    with Prometheus(tools["prometheus"], tmp_path, list(addresses.values())) as prometheus:
        assert [each["value"] for each in prometheus.until("up == 1", len(addresses))] == [1] * len(addresses)
        by_address = {address: name for name, address in addresses.items()}

        def numbers(expression: str, count: int) -> dict[str, float]:
            found = prometheus.until(expression, count)
            return {
                by_address[each["instance"]]
                + "".join(
                    f" {each[label]}" for label in ("role", "tier", "outcome", "direction") if label in each
                ): each["value"]
                for each in found
            }

        assert numbers("mooncake_conductor_instances", 2) == {"conductor prefill": 1, "conductor decode": 1}
        placed = numbers('mooncake_conductor_placements_total{outcome="placed"}', 1)
        assert placed["conductor placed"] >= NUM_REQUESTS
        assert numbers("mooncake_conductor_bookings", 1) == {"conductor": 0}
        assert numbers("mooncake_instance_role", 2) == {"prefill-0 prefill": 1, "decode-0 decode": 1}
        computed = numbers("mooncake_instance_computed_tokens_total", 2)
        assert computed["decode-0"] > 0 and computed["prefill-0"] > NUM_PROMPT
        loaded = numbers("mooncake_instance_loaded_tokens_total", 2)
        assert loaded["decode-0"] > 0
        stored = numbers("mooncake_instance_kv_bytes_total", 4)
        assert stored["prefill-0 store"] > 0 and stored["decode-0 load"] > 0 and stored["decode-0 store"] == 0
        hits, used = numbers("mooncake_store_hits_total", 1), numbers("mooncake_store_used_bytes", 1)
        assert hits["node-0 dram"] > 0 and used["node-0 dram"] > 0
        assert numbers("mooncake_store_capacity_bytes", 1) == {"node-0 dram": 64 << 20}
        assert numbers("mooncake_store_leases", 1) == {"node-0": 0}
        assert sum(numbers('mooncake_frontend_requests_total{endpoint="completions"}', 1).values()) >= NUM_REQUESTS
        assert len(prometheus.query("process_resident_memory_bytes")) == len(addresses)


def test_a_port_that_is_taken_is_named(cluster: Cluster, addresses: dict[str, str]) -> None:
    done = subprocess.run(
        [
            *(str(cluster.process.args[0]), "-m", "mooncake", "directory", "--listen", f"unix:{cluster.folder}/d.sock"),
            *("--metrics", addresses["conductor"], "--cluster", "another", "--run-dir", str(cluster.folder / "other")),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": "/bin", "MOONCAKE_TOKEN": "secret"},
        cwd=Path(__file__).parent.parent.parent,
    )
    port = addresses["conductor"].rpartition(":")[2]
    assert done.returncode == 2
    assert f"port {port} of 127.0.0.1 is in use; choose another or stop what uses it" in done.stderr
    assert "Traceback" not in done.stderr
