"""The main job: `mooncake serve` on this machine, from HTTP to tokens, and its engine beside transformers' own generate.

    python benchmarks/serve.py [--only NAME,...] [--quick]

ttft_idle_ms_p50           time to first token, simulated engine whose steps take no time, one request at a time
cpu_us_per_streamed_token  processor time of all processes but the engine threads, 64 streams; with the next the two
cpu_us_per_request         coefficients of cpu = a * requests + b * tokens over runs of several output lengths
handover_ms_p50            2,000 tokens, default model: first token computed until the first decode step begins
handover_copies            tokens of KV stored plus loaded by the CPU, per token handed over
reuse_ttft_ratio           2,000-token prefix computed by the other prefill instance: its TTFT by the cold one's
prefill_vs_transformers    our engine alone by generate, tokens/s, same process, threads, dtype and prompts, alternating
decode_b1_, decode_b8_     the same for decode steps of 1 and 8 sequences
ready_s_warm               start of `mooncake serve`, everything present, until /ready
rss_mb_total               memory of all processes of the default cluster then, shared pages counted once
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import MODEL, Cluster, Connection, complete_all, emit, event_log_entries, finish, percentile, spread

STREAMS = 64
PREFIX_TOKENS = 2000
BLOCK_TOKENS = 128
VOCAB = 49_000
Figures = dict[str, float]
rng = random.Random(0)


def prompt(length: int) -> list[int]:
    return [rng.randrange(10, VOCAB) for _ in range(length)]


# ---------------------------------------------------------------- without a model


def idle_ttft(quick: bool) -> Figures:
    async def ask(port: int, count: int) -> list[float]:
        async with Connection(port) as connection:
            return [1e3 * (await connection.complete(prompt(50), 4)).ttft_s for _ in range(count)]

    with Cluster("--engine", "simulated", "--simulated-hardware", "zero") as cluster:
        asyncio.run(ask(cluster.port, 50))
        found = asyncio.run(ask(cluster.port, 100 if quick else 500))
    emit(measurement="ttft_idle_ms", p90=round(percentile(found, 0.9), 3), **spread(found))
    return {"ttft_idle_ms_p50": statistics.median(found)}


def cpu(quick: bool) -> Figures:
    """H100's decode steps take 11 ms: tokens come one step after the other, as they do from a real engine."""
    rows: list[tuple[int, int]] = []
    used: list[float] = []
    num_requests = 256 if quick else 1024
    with Cluster("--engine", "simulated", "--simulated-hardware", "h100", "--prefill", "1", "--decode", "1") as cluster:
        asyncio.run(complete_all(cluster.port, [prompt(50) for _ in range(2 * STREAMS)], 8, STREAMS))
        for num_output in (2, 32, 128, 2, 32, 128):
            prompts = [prompt(50) for _ in range(num_requests)]
            before = cluster.cpu()
            answers = asyncio.run(complete_all(cluster.port, prompts, num_output, STREAMS))
            time.sleep(0.2)  # what nobody waits for is done a moment later
            after = cluster.cpu()
            parts = {name: after[name].rest - before[name].rest for name in after}
            rows.append((num_requests, sum(answer.num_output for answer in answers)))
            used.append(sum(parts.values()))
            each = {name: round(1e6 * seconds / num_requests, 1) for name, seconds in parts.items()}
            emit(measurement="cpu_us_per_request_by_process", output_tokens=num_output, **each)
    (per_request, per_token), *_ = np.linalg.lstsq(np.array(rows, dtype=float), np.array(used), rcond=None)
    return {"cpu_us_per_streamed_token": 1e6 * per_token, "cpu_us_per_request": 1e6 * per_request}


# ---------------------------------------------------------------- with the default model


def handover(quick: bool) -> Figures:
    count = 3 if quick else 8
    with Cluster("--prefill", "1", "--decode", "1", "--event-log", "{events}") as cluster:
        asyncio.run(complete_all(cluster.port, [prompt(PREFIX_TOKENS) for _ in range(count + 1)], 4, 1))
        firsts, stored = _prefill_side(cluster)
        starts, loaded = _decode_side(cluster)
    gaps = [(start - first) / 1e6 for first, start in zip(firsts, starts, strict=True)][1:]
    emit(measurement="handover_ms", **spread(gaps))
    handed_over = PREFIX_TOKENS * (count + 1)
    return {"handover_ms_p50": statistics.median(gaps), "handover_copies": (stored + loaded) / handed_over}


def _prefill_side(cluster: Cluster) -> tuple[list[int], int]:
    """When each first token was drawn; how many tokens of KV were stored."""
    firsts: list[int] = []
    stored = 0
    for now, event in event_log_entries(cluster.events, "prefill-0"):
        if event["type"] == "KvStored":
            stored += event["end"] - event["start"]
        outputs = event["outputs"] if event["type"] == "EngineProgress" else ()
        firsts += [now for output in outputs if output["type"] == "Drawn"]
    return firsts, stored


def _decode_side(cluster: Cluster) -> tuple[list[int], int]:
    """When each sequence's first step began; how many tokens of KV were loaded."""
    starts: dict[int, int] = {}
    loaded = 0
    for now, event in event_log_entries(cluster.events, "decode-0"):
        if event["type"] != "EngineProgress":
            continue
        loaded = event["load"]["num_loaded_tokens"]
        for output in event["outputs"]:
            if output["type"] == "Drawn":
                starts.setdefault(output["seq"], now - event["step_ns"])
    return list(starts.values()), loaded


def reuse(quick: bool) -> Figures:
    """Least load and equal pools: the instance that has not just computed the prefix gets the next request."""
    ratios: list[float] = []
    with Cluster("--prefill", "2", "--decode", "1", "--policy", "least_load") as cluster:
        for _ in range(2 if quick else 5):
            prefix = prompt(PREFIX_TOKENS)
            cold, warm = asyncio.run(_cold_and_warm(cluster, prefix))
            if warm is None:
                raise SystemExit("no request reached the other prefill instance")
            ratios.append(warm / cold)
            emit(measurement="reuse", cold_ms=round(1e3 * cold, 1), warm_ms=round(1e3 * warm, 1))
    return {"reuse_ttft_ratio": statistics.median(ratios)}


async def _cold_and_warm(cluster: Cluster, prefix: list[int]) -> tuple[float, float | None]:
    """TTFT of the first request, and of the first later one that another instance answered from the store."""
    async with Connection(cluster.port) as connection:
        before = cluster.cpu()
        cold = await connection.complete(prefix + prompt(40), 1)
        await asyncio.sleep(1)  # the first token is there before the last block is stored and reported
        middle = cluster.cpu()
        owner = max(("prefill-0", "prefill-1"), key=lambda name: middle[name].engine - before[name].engine)
        for _ in range(8):
            before = cluster.cpu()
            warm = await connection.complete(prefix + prompt(40), 1)
            after = cluster.cpu()
            ran = max(("prefill-0", "prefill-1"), key=lambda name: after[name].engine - before[name].engine)
            if warm.num_cached < PREFIX_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS:
                raise SystemExit(f"only {warm.num_cached} tokens were reused")
            if ran != owner:
                return cold.ttft_s, warm.ttft_s
    return cold.ttft_s, None


def start(quick: bool) -> Figures:
    ready: list[float] = []
    memory: list[float] = []
    for _ in range(1 if quick else 3):
        with Cluster() as cluster:
            ready.append(cluster.ready_s)
            memory.append(cluster.memory_mb())
    emit(measurement="ready_s", **spread(ready))
    emit(measurement="memory_mb", **spread(memory))
    return {"ready_s_warm": statistics.median(ready), "rss_mb_total": statistics.median(memory)}


# ---------------------------------------------------------------- the engine alone


class OurEngine:
    """The torch engine under its planner, in this thread."""

    def __init__(self, folder: Any, dtype: str) -> None:
        from mooncake.engine.base import EngineLimits
        from mooncake.engine.core import EngineCore
        from mooncake.engine.torch.build import build_from_folder

        limits = EngineLimits(512, 16, BLOCK_TOKENS, 8, 512, 4096)
        self._engine = build_from_folder(folder, dtype, limits)
        self._core = EngineCore(limits, overlap_loads=False, row_pages=limits.num_pages // limits.max_batch)
        self._num_seqs = 0

    def run(self, prompts: list[list[int]], num_output: int) -> float:
        """Seconds until all have their tokens."""
        from mooncake.core.types import AttemptKey, Job, SamplingParams
        from mooncake.engine.core import SequenceReleased

        greedy = SamplingParams(temperature=0.0)
        began = time.perf_counter()
        for tokens in prompts:
            self._num_seqs += 1
            self._engine.add_sequence(self._num_seqs, tokens, len(tokens), greedy, 0)
            key = AttemptKey("bench", self._num_seqs)
            self._core.submit(self._num_seqs, Job(key, len(tokens), len(tokens), num_output, (), b"", greedy))
        while not self._core.idle:
            plan = self._core.schedule()
            assert plan is not None
            self._core.update(plan, self._engine.run(plan, None, {}))
            for output in self._core.take_outputs():
                if isinstance(output, SequenceReleased):
                    self._engine.remove_sequence(output.seq)
        return time.perf_counter() - began


class TheirGenerate:
    def __init__(self, folder: Any, dtype: str) -> None:
        import torch
        import transformers

        self._torch = torch
        auto: Any = transformers.AutoModelForCausalLM
        self._model = auto.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(self, prompts: list[list[int]], num_output: int) -> float:
        ids = self._torch.tensor(prompts)
        began = time.perf_counter()
        with self._torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=num_output,
                min_new_tokens=num_output,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - began


def engine(quick: bool) -> Figures:
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # as every engine process sets it: spinning threads collapse under load
    import torch

    from mooncake.engine.models import resolve_model

    torch.set_num_threads(os.cpu_count() or 1)
    folder = resolve_model(MODEL).path
    found: Figures = {}
    for dtype in ("float32", "bfloat16"):  # the figures are of the last one, which is the default
        ours, theirs = OurEngine(folder, dtype), TheirGenerate(folder, dtype)
        for name, batch, length, num_output in (
            ("prefill", 1, 512, 1),
            ("decode_b1", 1, 64, 33),
            ("decode_b8", 8, 64, 33),
        ):
            ratios: list[float] = []
            speeds: list[tuple[float, float]] = []
            for _ in range(3 if quick else 7):
                speeds.append(
                    (_speed(ours.run, batch, length, num_output), _speed(theirs.run, batch, length, num_output))
                )
                ratios.append(speeds[-1][0] / speeds[-1][1])
            mine, other = (statistics.median(column) for column in zip(*speeds, strict=True))
            tokens_per_s = {"ours_tokens_per_s": round(mine, 1), "generate_tokens_per_s": round(other, 1)}
            emit(measurement=name, dtype=dtype, **tokens_per_s, **spread(ratios))
            found[f"{name}_vs_transformers"] = statistics.median(ratios)
    return found


def _speed(run: Callable[[list[list[int]], int], float], batch: int, length: int, num_output: int) -> float:
    """Tokens per second: of the prompt if one token is asked for, else of the decode steps alone."""
    prompts = [prompt(length) for _ in range(batch)]
    if num_output == 1:
        return batch * length / run(prompts, 1)
    return batch * (num_output - 1) / (run(prompts, num_output) - run([prompt(length) for _ in range(batch)], 1))


PARTS: dict[str, Callable[[bool], Figures]] = {
    "idle_ttft": idle_ttft,
    "cpu": cpu,
    "handover": handover,
    "reuse": reuse,
    "engine": engine,
    "start": start,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"--only: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    figures: Figures = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        figures |= PARTS[name](options.quick)
    finish("serve", figures)


if __name__ == "__main__":
    main()
