"""The Conductor's own cost: one placement, the other messages of a request, and the memory of its prefix index.

    python benchmarks/conductor.py [--only NAME,...] [--quick] [--policy NAME] [--profile]

place_us_p50_32       one whole placement (match, costs, choice, booking, prediction into the index, answer, record) with
place_us_p99_32       16 prefill and 16 decode instances on 16 nodes, when the index holds the whole conversation trace
place_us_p50_1000     the same with 500 prefill and 500 decode instances on 500 nodes, and as much more load
index_bytes_per_block resident memory for each of 10 M blocks, each held by a store node and by an instance

The trace passes twice: its first passage fills the index, in its second one each call of `handle` is measured in processor
time. The cluster around the core is a stand-in that does exactly what was predicted; it only serves to send the messages that
a request brings, as often as live: first token, cache reports, load reports at most every 50 ms, end.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import heapq
import itertools
import json
import os
import pstats
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import ROOT, emit, finish, percentile

from mooncake.core.messages import (
    AttemptEnded,
    CacheDelta,
    CacheSnapshot,
    LoadReport,
    NodeInfo,
    Placed,
    PlaceRequest,
    PrefillDone,
    Register,
    RegisterNode,
)
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, AttemptKey, CostModel, InstanceInfo, InstanceLoad, Role, Slo
from mooncake.scheduler.config import ConductorConfig, Rates
from mooncake.scheduler.core import ConductorCore, Received, Tick
from mooncake.scheduler.prefix_index import IN_FAST, PrefixIndex
from mooncake.trace.files import open_trace

TRACE = ROOT.parent / "shared" / "traces" / "conversation_trace.jsonl"
TRACE_BLOCK_TOKENS = 512
KV_TOKEN_BYTES = 327_680
COST = CostModel((0.0, 116.2, 1.428), (17.75, 0.058, 26.1))
"""Prefill: the paper's 8xA800; decode: 8xA100 (FACTS section 3)."""
RATES = Rates(dram_bytes_per_s=128e9, ssd_bytes_per_s=20e9, remote_bytes_per_s=87e9, nic_bytes_per_s=87e9)
"""Of the paper's nodes (FACTS sections 2 and 3)."""
REPORT_NS = 50 * NANOS_PER_MS
SLO = Slo(30 * NANOS_PER_S, 100 * NANOS_PER_MS)
Figures = dict[str, float]


Request = tuple[int, int, int, tuple[bytes, ...]]
"""Arrival, input tokens, output tokens, keys of the full blocks."""


def read_trace(quick: bool) -> list[Request]:
    requests = []
    for row in itertools.islice(open_trace(TRACE), 2_000 if quick else None):
        full = row.input_length // TRACE_BLOCK_TOKENS
        keys = tuple(number.to_bytes(16, "big") for number in (row.hash_ids or ())[:full])
        requests.append((row.arrival_ns, row.input_length, row.output_length, keys))
    return requests


# ---------------------------------------------------------------- placements


class World:
    """Messages that the core would get, in time; `timed` collects the processor time of each by its type."""

    def __init__(self, policy: str, num_instances: int) -> None:
        self.num_pairs = num_instances // 2
        self.core = ConductorCore(
            ConductorConfig(
                block_tokens=TRACE_BLOCK_TOKENS,
                kv_token_bytes=KV_TOKEN_BYTES,
                policy=policy,  # type: ignore[arg-type]
                rates=RATES,
            ),
            random.Random(0),
        )
        self.timed: dict[str, list[float]] = defaultdict(list)
        self.num_blocks = 0
        self.num_rejected = 0
        self._heap: list[tuple[int, int, Callable[[int], None]]] = []
        self._count = itertools.count()
        self._epoch = 1
        self._cache_seq: dict[str, int] = defaultdict(int)
        self._load_seq = 0
        self._reported: dict[str, int] = defaultdict(int)
        self._running: dict[str, list[int]] = {}
        self._handle: Callable[[str, Any, int], list[Any]] = self._tell
        for index in range(self.num_pairs):
            self._join(index)

    def _join(self, index: int) -> None:
        node = f"node-{index}"
        self._tell(node, RegisterNode(NodeInfo(node, 1, (f"tcp://{node}:1",), 1 << 40)), 0)
        self._tell(node, CacheSnapshot(node, 1, 0, "dram", ()), 0)
        for role in (Role.PREFILL, Role.DECODE):
            name = f"{role.value}-{index}"
            info = InstanceInfo(name, 1, role, f"{name}:1", "c", node, (), 16_384, 64, 128, 8192, COST)
            self._tell(name, Register(info), 0)
            self._tell(name, CacheSnapshot(name, 1, 0, "hbm", ()), 0)
            self._running[name] = [0, 0]

    def _tell(self, sender: str, message: Any, now: int) -> list[Any]:
        return self.core.handle(Received(sender, message), now)

    def _tell_timed(self, sender: str, message: Any, now: int) -> list[Any]:
        event = Received(sender, message)
        began = time.process_time_ns()
        commands = self.core.handle(event, now)
        self.timed[type(message).__name__].append((time.process_time_ns() - began) / 1e3)
        if type(message) is CacheDelta:
            self.num_blocks += len(message.added)
        return commands

    def at(self, when: int, call: Callable[[int], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._count), call))

    def run(self, requests: list[Request], offset: int, speed: float, timed: bool) -> int:
        """The last moment."""
        self._handle = self._tell_timed if timed else self._tell
        for number, request in enumerate(requests):
            self.at(offset + int(request[0] / speed), lambda now, n=number, r=request: self._arrive(n, r, now))  # type: ignore[misc]
        now = offset
        while self._heap:
            now, _, call = heapq.heappop(self._heap)
            due = self.core.deadline()
            if due is not None and due <= now:
                self._tick(due, timed)
            call(now)
        self._epoch += 1
        return now

    def _tick(self, due: int, timed: bool) -> None:
        began = time.process_time_ns()
        self.core.handle(Tick(), due)
        if timed:
            self.timed["Tick"].append((time.process_time_ns() - began) / 1e3)

    # ------------------------------------------------------------ a request

    def _arrive(self, number: int, request: Request, now: int) -> None:
        _, num_tokens, num_output, keys = request
        key = AttemptKey("frontend-0", number + self._epoch * 1_000_000)
        commands = self._handle("frontend-0", PlaceRequest(key, num_tokens, keys, None, slo=SLO), now)
        answer = commands[-1].message
        if not isinstance(answer, Placed):
            self.num_rejected += 1
            return
        prefill = answer.prefill or answer.decode
        self._load(prefill, 1, num_tokens, now)
        done_at = now + answer.prediction.ttft_ns
        self.at(done_at, lambda now: self._first_token(key, prefill, answer, num_tokens, num_output, keys, now))

    def _first_token(
        self, key: AttemptKey, prefill: str, answer: Placed, num_tokens: int, num_output: int, keys: Any, now: int
    ) -> None:
        self._handle("frontend-0", PrefillDone(key, answer.prediction.ttft_ns), now)
        node = f"node-{prefill.rpartition('-')[2]}"
        for holder, tier in ((prefill, "hbm"), (node, "dram")):
            self._cache_seq[holder] += 1
            self._handle(holder, CacheDelta(holder, 1, self._cache_seq[holder], tier, keys, ()), now)
        self._load(prefill, -1, -num_tokens, now)
        self._load(answer.decode, 1, num_tokens, now)
        end_at = now + num_output * max(answer.prediction.tbt_ns, NANOS_PER_MS)
        self.at(end_at, lambda now: self._end(key, answer.decode, num_tokens, num_output, now))

    def _end(self, key: AttemptKey, decode: str, num_tokens: int, num_output: int, now: int) -> None:
        self._handle("frontend-0", AttemptEnded(key, num_output, True, 30 * NANOS_PER_MS), now)
        self._load(decode, -1, -num_tokens, now)

    def _load(self, name: str, num_seqs: int, num_tokens: int, now: int) -> None:
        """The load changed: a report is due, at once or REPORT_NS after the last one."""
        running = self._running[name]
        running[0] += num_seqs
        running[1] += num_tokens
        if self._reported[name] <= now:
            when = max(now, self._reported[name] + REPORT_NS)
            self._reported[name] = when
            self.at(when, lambda now: self._report(name, now))

    def _report(self, name: str, now: int) -> None:
        num, tokens = self._running[name]
        self._load_seq += 1
        waiting = (num, tokens, 0, 0) if name.startswith("prefill") else (0, 0, num, tokens)
        free = max(0, 16_384 - tokens // 64)
        self._handle(name, LoadReport(InstanceLoad(name, 1, self._load_seq, *waiting, free, 20 * NANOS_PER_MS)), now)


def place(num_instances: int, policy: str, quick: bool, profile: bool) -> Figures:
    if not TRACE.exists():
        emit(measurement="PlaceRequest_us", instances=num_instances, skipped=f"the trace {TRACE} is not there")
        return {}
    requests = read_trace(quick)
    world = World(policy, num_instances)
    speed = num_instances / 32
    end = world.run(requests, 1, speed, timed=False)
    gc.collect()
    gc.freeze()
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    world.run(requests, end + 60 * NANOS_PER_S, speed, timed=True)
    profiler.disable()
    for name, values in world.timed.items():
        total = round(sum(values) / len(requests), 2)
        shown = {f"p{share}": round(percentile(values, share / 100), 2) for share in (50, 90, 99)}
        emit(
            measurement=f"{name}_us", instances=num_instances, count=len(values), max=round(max(values), 1),
            us_per_request=total, **shown,
        )  # fmt: skip
    deltas = world.timed["CacheDelta"]
    emit(
        measurement="cache_delta", us_per_block=round(sum(deltas) / world.num_blocks, 3),
        index_blocks=len(world.core.index), rejected=world.num_rejected, counts=dict(world.core.counts),
    )  # fmt: skip
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(45)
    places = world.timed["PlaceRequest"]
    return {
        f"place_us_p50_{num_instances}": percentile(places, 0.5),
        f"place_us_p99_{num_instances}": percentile(places, 0.99),
    }


# ---------------------------------------------------------------- memory


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def sequences(rng: random.Random, num_blocks: int) -> Iterator[tuple[bytes, ...]]:
    """Fresh keys, 25 at a time, as decoding a message makes them."""
    for _ in range(num_blocks // 25):
        data = rng.randbytes(400)
        yield tuple(data[at : at + 16] for at in range(0, 400, 16))


def fill_index(num_blocks: int, predicted: bool) -> float:
    """Bytes per block: each held by one of 16 store nodes and held, or predicted, by one of 16 instances."""
    index = PrefixIndex(num_blocks)
    slots = [index.add_holder() for _ in range(48)]
    rng = random.Random(1)
    gc.collect()
    before, began = resident_bytes(), time.process_time()
    for number, keys in enumerate(sequences(rng, num_blocks)):
        instance, node = slots[number % 16], slots[32 + number * 7 % 16]
        if predicted:
            index.predict(instance, keys, number)
        else:
            index.add(instance, IN_FAST, keys)
        index.add(node, IN_FAST, tuple(bytes(bytearray(key)) for key in keys))  # another message, other objects
    seconds = time.process_time() - began
    grown = resident_bytes() - before
    assert len(index) == num_blocks, len(index)
    emit(
        measurement="index", blocks=num_blocks, gigabytes=round(grown / 1e9, 3), bytes_per_block=round(grown / num_blocks, 1),
        us_per_block=round(1e6 * seconds / num_blocks, 3), predicted=predicted,
    )  # fmt: skip
    return grown / num_blocks


def index_memory(quick: bool) -> Figures:
    """In a process of its own: what the allocator has kept from before would hide growth."""
    found = []
    for predicted in (False, True):
        num_blocks = 2_000_000 if quick or predicted else 10_000_000
        command = [sys.executable, __file__, "--fill-index", str(num_blocks), *(["--predicted"] if predicted else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        line = json.loads(done.stdout)
        emit(**line)
        found.append(line["bytes_per_block"])
    return {"index_bytes_per_block": found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="place32,place1000,index", help="parts to run")
    parser.add_argument("--policy", default="joint")
    parser.add_argument("--quick", action="store_true", help="fewer requests and blocks")
    parser.add_argument("--profile", action="store_true", help="where the time goes, to stderr")
    parser.add_argument("--fill-index", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--predicted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill_index:
        fill_index(options.fill_index, options.predicted)
        return
    parts: dict[str, Callable[[], Figures]] = {
        "place32": lambda: place(32, options.policy, options.quick, options.profile),
        "place1000": lambda: place(1000, options.policy, options.quick, options.profile),
        "index": lambda: index_memory(options.quick),
    }
    names = options.only.split(",")
    unknown = [name for name in names if name not in parts]
    if unknown:
        parser.error(f"--only: no part {', '.join(unknown)}; there are {', '.join(parts)}")
    figures: Figures = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        figures |= parts[name]()
    wanted = ("place_us_p50_32", "place_us_p99_32", "place_us_p50_1000", "index_bytes_per_block")
    finish("conductor", {name: figures[name] for name in wanted if name in figures})


if __name__ == "__main__":
    main()
