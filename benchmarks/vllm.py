"""vLLM with our connector and a store of one node, beside vLLM without: the default model, bfloat16, stock servers.

    python benchmarks/vllm.py [--only NAME,...] [--quick]

ttft_cached95_vs_recompute        prompts of 3,000 tokens: TTFT where a store has 95 % of them, by TTFT without connector
save_us_per_block                 processor time of the copying thread, per block of 128 tokens: pages to store
load_us_per_block                 the same of the threads that fetch, check and copy: store to pages
pair_vs_single_throughput         requests/s of a pair with a core each, by those of one engine with both; 1,000 in, 64 out
connector_off_vs_on_throughput    requests/s of one engine without connector, by those with it; 1,000 in, 16 out
bf16_same, bf16_gap_max           greedy output of a pair in bfloat16 beside one engine's: share of prompts with the same 24
                                  tokens; where they part, how much less likely the pair's token is there, log probability
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import MODEL, ROOT, Answer, Connection, emit, finish, free_port, spread

PYTHON = ROOT / ".venv-vllm/bin/python"
READY_S = 240.0
PROMPT_TOKENS = 3000
CACHED_TOKENS = 2816
"""Whole blocks of 128: 94 %, and the nearest to 95."""
BLOCK_TOKENS = 128
STREAMS = 8
VOCAB = 49_000
Figures = dict[str, float]
rng = random.Random(0)


def prompt(length: int) -> list[int]:
    return [rng.randrange(10, VOCAB) for _ in range(length)]


class StoreProcess:
    """`mooncake store --nodes 1`. config: what connectors need."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "run/config.json"
        options = ("--run-dir", str(folder / "run"), "--cluster", f"bench-{os.getpid()}", "--store-memory", "2GiB")
        self._screen = folder / "store-screen"
        with self._screen.open("wb") as screen:
            argv = [sys.executable, "-m", "mooncake", "store", "--nodes", "1", *options]
            self._process = subprocess.Popen(argv, stdout=screen, stderr=subprocess.STDOUT, cwd=ROOT)
        _until(lambda: "stop  Ctrl-C" in self._screen.read_text(), self._process, self._screen)

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(20)


class Server:
    """cores: "0", "1" or "0-1". role: None for no connector."""

    def __init__(self, folder: Path, model: Path, cores: str, store: StoreProcess, role: str | None) -> None:
        self.port = free_port()
        self._log = folder / f"vllm-{self.port}.log"
        options = [
            *("--model", str(model), "--served-model-name", MODEL, "--dtype", "bfloat16", "--port", str(self.port)),
            *("--enforce-eager", "--distributed-executor-backend", "uni", "--kv-cache-memory-bytes", str(512 << 20)),
            *("--max-model-len", "4096", "--max-num-batched-tokens", "1024", "--max-num-seqs", "16"),
            "--enable-prompt-tokens-details",
        ]
        if role is not None:
            options += ["--kv-transfer-config", json.dumps(_transfer(store, role))]
        environ = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "OMP_NUM_THREADS": str(1 + cores.count("-")),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        with self._log.open("wb") as log:
            # Without workers of their own vLLM heeds no VLLM_CPU_OMP_THREADS_BIND.
            argv = ["taskset", "-c", cores, str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *options]
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environ, start_new_session=True
            )

    def until_ready(self) -> None:
        def ready() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return True
            except OSError:
                return False

        _until(ready, self.process, self._log)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def thread_s(self, *names: str) -> float:
        """Processor time of the engine's threads of those names."""
        found = subprocess.run(["pgrep", "-g", str(self.process.pid)], capture_output=True, text=True, check=True)
        used = 0
        for pid in found.stdout.split():
            for task in Path(f"/proc/{pid}/task").iterdir():
                if (task / "comm").read_text().strip() in names:
                    used += int((task / "schedstat").read_text().split()[0])
        return used / 1e9


def _transfer(store: StoreProcess, role: str) -> dict[str, Any]:
    return {
        "kv_connector": "MooncakeKvConnector",
        "kv_connector_module_path": "mooncake.engine.vllm.connector",
        "kv_role": role,
        "kv_connector_extra_config": {"config": str(store.config)},
    }


def _until(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"a server did not become ready:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)


class Bench:
    """The store, and servers that a measurement starts: `servers` stops them."""

    def __init__(self, folder: Path, model: Path, quick: bool) -> None:
        self.quick = quick
        self._folder = folder
        self._model = model
        self.store = StoreProcess(folder)

    @contextlib.contextmanager
    def servers(self, *wanted: tuple[str, str | None]) -> Iterator[list[Server]]:
        """wanted: cores and role of each."""
        started = [Server(self._folder, self._model, cores, self.store, role) for cores, role in wanted]
        try:
            for server in started:
                server.until_ready()
            for server in started:
                ask(server, [prompt(200)] * 2, 4, 1)
            yield started
        finally:
            for server in started:
                server.close()


async def complete(server: Server, each: list[int], max_tokens: int, transfer: str = "") -> Answer:
    """On a connection of its own: vLLM's server closes those that are idle for 5 s. transfer: what a router of pairs says."""
    async with Connection(server.port) as connection:
        return await connection.complete(each, max_tokens, **_told(transfer))


def _told(transfer: str) -> dict[str, Any]:
    return {"kv_transfer_params": {transfer: True}} if transfer else {}


def ask(server: Server, prompts: Sequence[list[int]], max_tokens: int, streams: int) -> list[float]:
    """TTFT of each, in seconds, `streams` at a time."""
    waiting, found = iter(prompts), []

    async def client() -> None:
        for each in waiting:
            answer = await complete(server, each, max_tokens)
            found.append(answer.ttft_s)

    async def run() -> None:
        await asyncio.gather(*(client() for _ in range(streams)))

    asyncio.run(run())
    return found


# ---------------------------------------------------------------- measurements


def ttft(bench: Bench) -> Figures:
    """One server computes the prefixes and stores them, another one, whose own cache is empty, finds them."""
    count = 4 if bench.quick else 12
    prompts = [prompt(PROMPT_TOKENS) for _ in range(count)]
    with bench.servers(("0", "kv_both"), ("1", "kv_both")) as (writer, reader):
        before = writer.thread_s("kv-store")
        ask(writer, [each[:CACHED_TOKENS] for each in prompts], 1, 1)
        time.sleep(1.0)
        num_blocks = count * CACHED_TOKENS / BLOCK_TOKENS
        save_us = 1e6 * (writer.thread_s("kv-store") - before) / num_blocks
        before = reader.thread_s("kv-fetch", "kv-load", "kv-ahead")
        cached = ask(reader, prompts, 1, 1)
        load_us = 1e6 * (reader.thread_s("kv-fetch", "kv-load", "kv-ahead") - before) / num_blocks
    with bench.servers(("1", None)) as (alone,):
        computed = ask(alone, prompts, 1, 1)
    emit(measurement="ttft_s_cached95", **spread(cached))
    emit(measurement="ttft_s_recompute", **spread(computed))
    return {
        "ttft_cached95_vs_recompute": statistics.median(cached) / statistics.median(computed),
        "save_us_per_block": save_us,
        "load_us_per_block": load_us,
    }


def rate(act: Any, count: int) -> float:
    began = time.monotonic()
    act()
    return count / (time.monotonic() - began)


def pair(bench: Bench) -> Figures:
    count = 16 if bench.quick else 48
    prompts = [prompt(1000) for _ in range(count)]
    computed: list[int] = []

    async def through_pair(prefill: Server, decode: Server) -> None:
        waiting = iter(prompts)

        async def client() -> None:
            for each in waiting:
                await complete(prefill, each, 1, "do_remote_decode")
                answer = await complete(decode, each, 64, "do_remote_prefill")
                computed.append(len(each) - answer.num_cached)

        await asyncio.gather(*(client() for _ in range(STREAMS)))

    with bench.servers(("0", "kv_producer"), ("1", "kv_consumer")) as (prefill, decode):
        of_pair = rate(lambda: asyncio.run(through_pair(prefill, decode)), count)
    with bench.servers(("0-1", None)) as (alone,):
        of_one = rate(lambda: ask(alone, prompts, 64, STREAMS), count)
    emit(measurement="requests_per_s", pair=round(of_pair, 3), single=round(of_one, 3))
    emit(measurement="prompt_tokens_computed_by_decode", **spread(computed))
    return {"pair_vs_single_throughput": of_pair / of_one}


def overhead(bench: Bench) -> Figures:
    """In turns, each server on the same core."""
    count = 8 if bench.quick else 16
    rates: dict[bool, list[float]] = {True: [], False: []}
    with bench.servers(("1", "kv_both"), ("1", None)) as (with_connector, without):
        for _ in range(2 if bench.quick else 4):
            for on, server in ((False, without), (True, with_connector)):
                prompts = [prompt(1000) for _ in range(count)]
                rates[on].append(rate(lambda server=server, prompts=prompts: ask(server, prompts, 16, STREAMS), count))
    emit(measurement="requests_per_s_connector_on", **spread(rates[True]))
    emit(measurement="requests_per_s_connector_off", **spread(rates[False]))
    return {"connector_off_vs_on_throughput": statistics.median(rates[False]) / statistics.median(rates[True])}


def bf16(bench: Bench) -> Figures:
    """Chunks are equal, as prompts fit into one and come one by one."""
    prompts = [prompt(length) for length in (5, 30, 128, 129, 250, 400, 640, 841)]

    def greedy(
        server: Server, each: list[int], max_tokens: int = 24, transfer: str = ""
    ) -> list[tuple[str, dict[str, float]]]:
        """The tokens, and log probabilities of the best ones at each place."""
        body = {"model": MODEL, "prompt": each, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
                "logprobs": 5, "return_tokens_as_token_ids": True, **_told(transfer)}  # fmt: skip
        url, data = f"http://127.0.0.1:{server.port}/v1/completions", json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)["choices"][0]["logprobs"]
        return list(zip(found["tokens"], found["top_logprobs"], strict=True))

    gaps: list[float] = []
    with bench.servers(("0", "kv_producer"), ("1", "kv_consumer"), ("0", None)) as (prefill, decode, alone):
        for each in prompts:
            greedy(prefill, each, 1, "do_remote_decode")
            pairs = zip(greedy(decode, each, transfer="do_remote_prefill"), greedy(alone, each), strict=True)
            parted = ((token, best) for (token, _), (other, best) in pairs if token != other)
            gaps += [max(best.values()) - best[token] for token, best in itertools.islice(parted, 1)]
    emit(measurement="bf16_gaps", gaps=[round(gap, 4) for gap in gaps])
    return {"bf16_same": 1 - len(gaps) / len(prompts), "bf16_gap_max": max(gaps, default=0.0)}


MEASUREMENTS = {"ttft": ttft, "pair": pair, "overhead": overhead, "bf16": bf16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MEASUREMENTS))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if not PYTHON.exists():
        raise SystemExit("vLLM's environment is not there: make vllm-env")
    sys.path.insert(0, str(ROOT))
    from mooncake.engine.models import resolve_model

    model = resolve_model(MODEL).path
    folder = Path(tempfile.mkdtemp(prefix="mooncake-bench-"))
    figures: Figures = {}
    bench = Bench(folder, model, arguments.quick)
    try:
        for name in arguments.only.split(","):
            found = MEASUREMENTS[name](bench)
            emit(measurement=name, **{figure: round(value, 4) for figure, value in found.items()})
            figures |= found
    finally:
        bench.store.close()
        shutil.rmtree(folder, ignore_errors=True)
    finish("vllm", figures)


if __name__ == "__main__":
    main()
