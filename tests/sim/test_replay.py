"""A replay's numbers, against what one works out by hand, and its lines and columns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pytest

from mooncake.core import stats
from mooncake.core.errors import ConfigError
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, CostModel, Slo
from mooncake.scheduler.config import ConductorConfig, Rates
from mooncake.sim.cluster import ClusterConfig
from mooncake.sim.collect import Gaps, RequestLine
from mooncake.sim.frontend import SimRequest
from mooncake.sim.network import NetworkConfig
from mooncake.sim.node import NodeConfig
from mooncake.sim.replay import Replay, run_replay
from mooncake.sim.report import Distribution, effective_share
from mooncake.sim.samples import spread_on, step_ns
from mooncake.sim.workload import START_NS, Workload, block_keys, check_blocks, jittered, sim_requests
from mooncake.trace.types import TraceFormat, TraceRequest

BLOCK = 64
EXACT = ClusterConfig(
    prefill=1,
    decode=1,
    nodes=2,
    block_tokens=BLOCK,
    cost=CostModel((0.0, 1000.0, 0.0), (10.0, 0.0, 0.0)),
    network=NetworkConfig(latency_ns=0, jitter_ns=0),
    node=NodeConfig(block_tokens=BLOCK, call_ns=0, local_bytes_per_s=1e18, nic_bytes_per_s=1024e6, checked=False),
    conductor=ConductorConfig(
        block_tokens=BLOCK, kv_token_bytes=1024, admission="off", rates=Rates(remote_bytes_per_s=1024e6)
    ),
)
"""A prefilled token takes 1 ms, a decode step 10 ms, a token from one machine to the other 1 us, all else nothing."""
MS = NANOS_PER_MS


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def request(at_ms: int, num_tokens: int, output: int, *keys: int, **more: object) -> SimRequest:
    return SimRequest(START_NS + at_ms * MS, num_tokens, output, tuple(map(key, keys)), **more)  # type: ignore[arg-type]


def run(
    requests: Sequence[SimRequest], slo: Slo | None = None, config: ClusterConfig = EXACT
) -> tuple[Replay, list[RequestLine]]:
    lines: list[bytes] = []
    replay = run_replay(config, iter(requests), 10 * NANOS_PER_S, slo=slo, write=lines.append)
    return replay, [msgspec.json.decode(line, type=RequestLine) for line in lines]


def test_times_and_reuse_worked_out_by_hand() -> None:
    """The second prompt begins like the first one, with 128 of 200 tokens, which lie in the prefill instance's own pages."""
    _, [first, second] = run([request(0, 150, 3, 1, 2), request(1000, 200, 1, 1, 2, 3)])
    assert (first.ttft_ms, first.network_ms, first.cached_tokens) == (150.0, 0.0, 0)
    # Handing 150 tokens over takes 0.15 ms, then two steps of 10 ms; of two gaps the longest counts.
    assert (first.tbt_ms, first.itl_ms, first.latency_ms) == (10.15, 10.075, 170.15)
    assert (first.handover_ms, second.handover_ms) == (10.15, None)
    assert (first.prefill, first.decode, first.outcome, first.attempts) == ("prefill-0", "decode-0", "stop", 1)
    assert (second.ttft_ms, second.cached_tokens, second.output_tokens) == (72.0, 128, 1)
    assert (second.reused.hbm, second.reused.dram_local, second.reused.dram_remote) == (128, 0, 0)
    assert (second.tbt_ms, second.itl_ms, second.latency_ms) == (None, None, 72.0)
    assert (first.predicted_ttft_ms, second.predicted_ttft_ms) == (150.0, 72.0)
    assert (first.stages_ms.prefill_start, first.stages_ms.first_token, first.stages_ms.end) == (0.0, 150.0, 170.15)


def test_objectives_decide_what_is_effective() -> None:
    slo = Slo(ttft_ns=100 * MS, tbt_ns=10 * MS)
    requests = [request(0, 80, 1, 1), request(1000, 80, 3, 2), request(2000, 150, 1, 3, 4), request(3000, 5000, 1)]
    replay, lines = run([msgspec.structs.replace(each, slo=slo) for each in requests], slo)
    # No gap: met; a gap of 10.08 ms; a first token after 150 ms; the same.
    assert [line.effective for line in lines] == [True, False, False, False]
    assert effective_share(replay, Slo(ttft_ns=100 * MS)) == 0.5
    assert effective_share(replay, Slo()) == 1.0
    assert effective_share(replay, Slo(tbt_ns=10 * MS)) == 0.75
    assert effective_share(replay, Slo(tbt_ns=10 * MS), handover=False) == 1.0


def test_columns_agree_with_the_definitions() -> None:
    rng = random.Random(1)
    requests = [request(at * 7, rng.randrange(1, 300), rng.randrange(1, 40)) for at in range(60)]
    requests = [
        msgspec.structs.replace(each, block_keys=tuple(key(1000 * at + n) for n in range(each.num_tokens // BLOCK)))
        for at, each in enumerate(requests)
    ]
    replay, lines = run(requests)
    collector = replay.collector
    assert (collector.num_ended, replay.num_requests, len(lines)) == (60, 60, 60)
    assert [line.number for line in lines] == list(range(60))
    ttft = sorted(line.ttft_ms for line in lines if line.ttft_ms is not None)
    found = Distribution.of(collector.ttft.values())
    assert (found.p50, found.p90, found.p99) == tuple(stats.percentile(ttft, share) for share in (0.5, 0.9, 0.99))
    assert found.max == ttft[-1]
    assert collector.gaps.number == sum(line.output_tokens - 1 for line in lines)
    assert sum(collector.output_tokens.values()) == sum(each.output_length for each in requests)


def test_gaps_are_counted_to_a_part_in_256() -> None:
    rng = np.random.default_rng(1)
    values = (rng.lognormal(17, 1.5, 100_000)).astype(np.int64)
    gaps = Gaps()
    for part in np.array_split(values, 17):
        gaps.add(part)
    exact = [stats.percentile(values.tolist(), share) for share in (0.5, 0.99, 1.0)]
    for found, value in zip(gaps.quantiles([0.5, 0.99, 1.0]), exact, strict=True):
        assert found is not None and value is not None and value <= found <= value * (1 + 1 / 128)
    assert (gaps.number, gaps.total_ns) == (100_000, int(values.sum()))
    assert Gaps().quantiles([0.5]) == [None]


def test_load_over_time_is_dealt_to_the_steps_it_belongs_to() -> None:
    assert spread_on([0, 25, 0, 5], 10) == [0.0, 1.0, 1.0, 1.0]
    assert [step_ns(span * NANOS_PER_S) // NANOS_PER_S for span in (1, 3537, 10**9)] == [1, 30, 3600]


def test_instances_and_links_are_looked_at() -> None:
    replay, _ = run([request(0, 1900, 31, *range(29)), request(3000, 10, 1)])
    [prefill, decode] = replay.load
    assert (prefill.name, prefill.busy) == ("prefill-0", [1.0, 0.9, 0.0])
    assert sum(decode.busy) == pytest.approx(0.3)
    assert prefill.running[:2] == [1, 0]
    moved = {link.name: link.num_bytes for link in replay.links if link.num_bytes}
    handed_over = 1900 * 1024
    assert moved == {"node-0.memory": (2 * 1900 + 10) * 1024, "node-0.out": handed_over, "node-1.in": handed_over}
    assert replay.duration_ns == 3010 * MS


def test_a_request_too_long_for_any_instance_fails_and_is_not_effective() -> None:
    replay, [line] = run([request(0, 40_000, 5)])
    assert (line.outcome, line.ttft_ms, line.effective, line.prefill) == ("too_long", None, False, "")
    assert dict(replay.collector.outcomes) == {"too_long": 1}


# ------------------------------------------------------------ from a trace


def traced(*arrivals_s: float) -> Iterator[TraceRequest]:
    return (TraceRequest(round(at * NANOS_PER_S), 10, 1, (number,)) for number, at in enumerate(arrivals_s))


def test_jitter_keeps_the_order_and_stays_within_the_step() -> None:
    arrivals = [0, 0, 0, 3, 3, 6, 6, 6, 9]
    found = list(jittered(traced(*arrivals), 3 * NANOS_PER_S, random.Random(5)))
    assert [request.hash_ids for _, request in found] == [(number,) for number in range(9)]
    times = [at / NANOS_PER_S for at, _ in found]
    assert times == sorted(times)
    assert all(own <= at <= own + 3 for own, at in zip(arrivals, times, strict=True))
    assert len(set(times)) == 9
    assert found == list(jittered(traced(*arrivals), 3 * NANOS_PER_S, random.Random(5)))
    assert [at for at, _ in jittered(traced(0, 3), 0, random.Random(5))] == [0, 3 * NANOS_PER_S]


def test_speed_limit_and_slo_reach_the_requests() -> None:
    slo = Slo(ttft_ns=1)
    workload = Workload(limit=2, speed=2.0, slo=slo)
    found = list(sim_requests(traced(0, 3, 6), TraceFormat("mooncake", 512), 512, workload))
    assert [(each.arrival_ns - START_NS) / NANOS_PER_S for each in found] == [0.0, 1.5]
    assert [each.slo for each in found] == [slo, slo]


def test_keys_name_whole_prefixes_whatever_the_block_length() -> None:
    ids = (7, 8, 9, 10)
    assert block_keys(ids, 16, 16, 3) == (key(7), key(8), key(9))
    assert block_keys(ids, 16, 32, 2) == (key(8), key(10))
    halves = block_keys(ids, 16, 8, 5)
    assert len(set(halves)) == 5
    assert halves == block_keys((7, 8, 9, 11), 16, 8, 5)
    assert halves[:4] == block_keys((7, 8, 12, 11), 16, 8, 5)[:4]
    assert halves[4] != block_keys((7, 8, 12, 11), 16, 8, 5)[4]
    with pytest.raises(
        ConfigError, match="block_tokens = 24: neither a multiple nor a part of the trace's blocks of 16"
    ):
        check_blocks(TraceFormat("bailian", 16), 24)


def test_prompts_without_prefixes_share_nothing() -> None:
    trace = [TraceRequest(at, 1024, 1, None) for at in range(3)]
    found = list(sim_requests(trace, TraceFormat("azure", None), 512, Workload()))
    keys = [each for request in found for each in request.block_keys]
    assert len(set(keys)) == 6
    named = [TraceRequest(at, 1024, 1, (1, 2)) for at in range(3)]
    found = list(sim_requests(named, TraceFormat("mooncake", 512), 512, Workload(reuse=False)))
    assert len({each for request in found for each in request.block_keys}) == 6


def test_requests_are_drawn_when_the_one_before_arrives_and_lines_written_when_they_end() -> None:
    lines: list[bytes] = []
    ahead: list[int] = []

    def endless() -> Iterator[SimRequest]:
        for number in range(200):
            ahead.append(number - len(lines))
            yield request(20 * number, 10, 1)

    replay = run_replay(EXACT, endless(), 4 * NANOS_PER_S, write=lines.append)
    assert (replay.num_requests, len(lines)) == (200, 200)
    assert max(ahead) == 1  # all before have ended when the one before arrives


def test_lines_are_in_the_order_of_arrival_though_ends_are_not() -> None:
    _, lines = run([request(0, 100, 50), request(200, 10, 1), request(300, 10, 2)])
    assert [line.number for line in lines] == [0, 1, 2]
    assert lines[0].arrival_ms + (lines[0].latency_ms or 0) > lines[2].arrival_ms + (lines[2].latency_ms or 0)
