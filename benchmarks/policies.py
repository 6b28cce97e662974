"""Policy joint against the paper's Algorithm 1: goodput at the same objectives over load, network, split of the pools, trace.

    python benchmarks/policies.py [--quick] [--limit N] [--seeds N] [--traces LIST] [--speeds LIST] [--nics LIST] [--pools LIST]

Goodput is the share of requests that meet TTFT 30 s and TBT 100 ms, at the same load of both. Every cell is simulated with
each seed; a seed spreads arrivals over three seconds, the clock of the conversation trace. `spread`: between the seeds of one
policy, the larger one of both. `difference`: joint's mean less Algorithm 1's, in percent of requests; `relative`: the same in
percent of Algorithm 1's goodput.

worst_difference_percent   the least `difference` of all cells; what lies within the seeds' spread counts as none
worst_relative_percent     the same of `relative`
num_cells_worse            cells where joint's goodput is lower by more than 1 % and by more than the spread
num_cells_better           cells where it is higher by as much
mean_difference_percent    over all cells
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

from common import ROOT, emit, finish

from mooncake.plan import replay
from mooncake.plan.options import parse_options

TRACES = {
    "conversation": "conversation_trace.jsonl",
    "synthetic": "synthetic_trace.jsonl",
    "azure": "AzureLLMInferenceTrace_conv.csv",
}
TRACE_FOLDER = ROOT.parent / "shared" / "traces"
SLO = "ttft=30,tbt=0.1"
JITTER = "3"
BASELINE, OURS = "algorithm1", "joint"
WORSE_PERCENT = 1.0
FIELDS = ("effective", "ttft_ms_mean", "ttft_ms_p99", "tbt_ms_p90", "hit_rate", "prediction_error")


class Cell(NamedTuple):
    trace: str
    speed: float
    nic_gbps: float
    pools: str


def run_once(cell: Cell, trace: replay.CheckedTrace, policy: str, limit: int, seed: int) -> dict[str, float]:
    prefill, _, decode = cell.pools.partition(":")
    given = {
        "policy": policy, "slo": SLO, "jitter": JITTER, "limit": str(limit), "seed": str(seed), "speed": str(cell.speed),
        "nic_gbps": str(cell.nic_gbps), "prefill": prefill, "decode": decode,
    }  # fmt: skip
    report = replay.replay_trace(trace, parse_options(given)).report
    latency = report.latency
    found = (
        100.0 * (report.service.effective_share or 0.0), latency.ttft_ms.mean, latency.ttft_ms.p99, latency.tbt_ms.p90,
        report.reuse.hit_rate_by_token, report.prediction.mean_relative_error,
    )  # fmt: skip
    return {name: round(value or 0.0, 4) for name, value in zip(FIELDS, found, strict=True)}


def measure(cell: Cell, trace: replay.CheckedTrace, limit: int, seeds: int) -> dict[str, float]:
    runs = {
        policy: [run_once(cell, trace, policy, limit, seed) for seed in range(seeds)] for policy in (BASELINE, OURS)
    }
    shares = {policy: [run["effective"] for run in found] for policy, found in runs.items()}
    spread = max(max(found) - min(found) for found in shares.values())
    theirs, ours = (sum(shares[policy]) / seeds for policy in (BASELINE, OURS))
    difference = ours - theirs
    relative = 100.0 * difference / theirs if theirs else 0.0
    means = {
        policy: {name: round(sum(run[name] for run in found) / seeds, 3) for name in FIELDS}
        for policy, found in runs.items()
    }
    line = {"difference": round(difference, 3), "relative": round(relative, 2), "spread": round(spread, 3)}
    emit(**cell._asdict(), **line, **means)
    return line


def summarise(lines: list[dict[str, float]]) -> dict[str, float]:
    clear = [line for line in lines if abs(line["difference"]) > line["spread"]]
    return {
        "worst_difference_percent": min([0.0, *(line["difference"] for line in clear)]),
        "worst_relative_percent": min([0.0, *(line["relative"] for line in clear)]),
        "num_cells": len(lines),
        "num_cells_worse": sum(line["relative"] < -WORSE_PERCENT for line in clear),
        "num_cells_better": sum(line["relative"] > WORSE_PERCENT for line in clear),
        "mean_difference_percent": sum(line["difference"] for line in lines) / len(lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", default=",".join(TRACES), help="of these")
    parser.add_argument("--speeds", default="1,2,3", help="how much faster than in the trace requests come")
    parser.add_argument("--nics", default="10,100,800", help="gigabits per second of each node")
    parser.add_argument("--pools", default="12:4,8:8,4:12", help="prefill:decode instances")
    parser.add_argument("--limit", type=int, default=1_000, help="requests from the beginning of each trace")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="600 requests, one seed")
    options = parser.parse_args()
    limit, seeds = (600, 1) if options.quick else (options.limit, options.seeds)
    names = options.traces.split(",")
    if unknown := [name for name in names if name not in TRACES]:
        parser.error(f"--traces: there is no {', '.join(unknown)}; there are {', '.join(TRACES)}")
    lines = []
    for name in names:
        path: Path = TRACE_FOLDER / TRACES[name]
        if not path.exists():
            emit(trace=name, skipped=f"the trace {path} is not there")
            continue
        trace = replay.check(str(path), limit=limit)
        grid = itertools.product(options.speeds.split(","), options.nics.split(","), options.pools.split(","))
        for speed, nic, pools in grid:
            lines.append(measure(Cell(name, float(speed), float(nic), pools), trace, limit, seeds))
    if not lines:
        raise SystemExit("policies: no trace is there, so nothing can be replayed")
    finish("policies", summarise(lines))


if __name__ == "__main__":
    main()
