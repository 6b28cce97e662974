"""The operator's commands on real processes: an instance is drained under load and takes requests again, a request is
explained, and its spans reach a collector."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.frontend.collector import Collector, attributes
from tests.live.harness import ROOT, Client, Cluster, Completion, clean_environment

OPTIONS = ("--engine", "simulated", "--prefill", "2", "--decode", "2", "--slo-ttft-s", "5")
WAIT_S = 30.0


def command(cluster: Cluster, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mooncake", *argv, "--run-dir", str(cluster.run_dir)],
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd=ROOT,
        timeout=60,
        check=False,
    )


def told(cluster: Cluster, *argv: str) -> str:
    done = command(cluster, *argv)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def status(cluster: Cluster) -> dict[str, Any]:
    return dict(json.loads(told(cluster, "status", "--json")))


def instances(cluster: Cluster) -> dict[str, dict[str, Any]]:
    found = status(cluster)["cluster"]
    return {each["name"]: each for each in found["instances"]} if found is not None else {}


def until(cluster: Cluster, name: str, state: str) -> None:
    deadline = time.monotonic() + WAIT_S
    found: Any = None
    while time.monotonic() < deadline:
        found = instances(cluster).get(name, {}).get("state")
        if found == state:
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} is {found}, and not {state}")


def run(
    cluster: Cluster, count: int, num_tokens: int, meanwhile: Callable[[], None] = lambda: None
) -> list[Completion]:
    """So many streams at a time."""

    async def scenario() -> list[Completion]:
        async with Client(cluster) as client:
            streams = [
                asyncio.create_task(client.complete([100 + at] * (300 + at), num_tokens, seed=at))
                for at in range(count)
            ]
            await asyncio.sleep(1)
            await asyncio.to_thread(meanwhile)
            return list(await asyncio.gather(*streams))

    completions = asyncio.run(scenario())
    for at, found in enumerate(completions):
        assert (found.error, found.num_output) == ("", num_tokens), f"stream {at}"
    return completions


def test_an_instance_is_drained_under_load_and_stays_so_until_it_is_undrained() -> None:
    with Cluster(*OPTIONS) as cluster:
        outputs: list[str] = []

        def drain() -> None:
            assert instances(cluster)["decode-0"]["num_running"] > 0, "it has something to finish"
            outputs.append(told(cluster, "drain", "decode-0", "--wait"))
            outputs.append(told(cluster, "drain", "prefill-1", "--wait"))

        run(cluster, 8, 400, drain)
        assert outputs[0].startswith("decode-0 is draining\n") and outputs[0].endswith("decode-0 is drained\n")
        assert outputs[1].endswith("prefill-1 is drained\n")
        before = instances(cluster)
        run(cluster, 6, 60)
        after = instances(cluster)
        assert {name for name, each in after.items() if each["state"] == "drained"} == {"decode-0", "prefill-1"}
        assert after["decode-0"]["tokens_per_s"] <= before["decode-0"]["tokens_per_s"], "it got nothing"
        assert after["decode-1"]["tokens_per_s"] > 0

        pid = cluster.kill("decode-0")
        cluster._until(lambda: cluster.pids().get("decode-0", pid) != pid, "decode-0 to be started again")
        until(cluster, "decode-0", "drained")
        pid = cluster.kill("conductor")
        cluster._until(lambda: cluster.pids().get("conductor", pid) != pid, "the Conductor to be started again")
        until(cluster, "decode-0", "drained")
        until(cluster, "prefill-1", "drained")
        run(cluster, 4, 20)

        assert told(cluster, "undrain", "decode-0") == "decode-0 is ready\n"
        told(cluster, "undrain", "prefill-1")
        cluster.until_serving()
        run(cluster, 8, 100, lambda: None)
        assert instances(cluster)["decode-0"]["tokens_per_s"] > 0, "it takes requests again"
        time.sleep(1)
        cluster.checkpoint("at the end")


def test_the_state_of_a_cluster_is_shown_and_a_request_explained_and_traced() -> None:
    with Collector() as collector, Cluster(*OPTIONS, "--otlp-endpoint", collector.url) as cluster:
        run(cluster, 4, 30)

        async def one() -> None:
            async with Client(cluster) as client:
                body = {"model": client.model, "prompt": [7] * 300, "max_tokens": 8, "ignore_eos": True}
                headers = {"x-request-id": "why-7", "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
                answer = await client._http.post("/v1/completions", json=body, headers=headers)
                assert answer.status_code == 200, answer.text

        asyncio.run(one())
        found = status(cluster)
        assert found["requests"]["num_ended"] == 5 and found["requests"]["ttft"]["met"] == 1.0
        assert found["cluster"]["counts"]["placed"] == 5
        deadline = time.monotonic() + WAIT_S
        while not any(tier["used_bytes"] for node in status(cluster)["cluster"]["nodes"] for tier in node["tiers"]):
            assert time.monotonic() < deadline, "the store node told how full it is"
            time.sleep(0.2)
        text = told(cluster, "explain", "why-7")
        assert text.startswith("why-7 completed: 300 prompt tokens") and "placed by joint" in text and "TTFT" in text
        missing = command(cluster, "explain", "why-8")
        assert missing.returncode == 2 and "no request 'why-8' is known here" in missing.stderr
        spans = collector.until(35)
        ours = {span.name: span for span in spans if span.trace_id.hex() == "ab" * 16}
        assert sorted(ours) == [
            "decode", "hand over", "place", "prefill", "request", "wait for decode", "wait for prefill",
        ]  # fmt: skip
        whole = attributes(ours["request"])
        assert (whole["mooncake.request_id"], whole["gen_ai.usage.output_tokens"]) == ("why-7", 8)
        cluster.stop()
        gone = command(cluster, "status")
        assert gone.returncode == 2 and "no cluster runs there" in gone.stderr
