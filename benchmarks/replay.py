"""The conversation trace through 8 prefill and 8 decode instances, with everything that `mooncake replay --out` writes.

Each run is a process of its own, with another seed for hashes; processor time is that of the whole process from reading the
trace to the last byte written, imports apart. `identical`: summary, lines and page of two runs are the same, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args, get_type_hints

from common import ROOT, emit, finish

from mooncake.plan import replay, replay_page
from mooncake.plan.options import parse_options
from mooncake.scheduler.config import ConductorConfig

TRACE = ROOT.parent / "shared" / "traces" / "conversation_trace.jsonl"
SLO = "ttft=30,tbt=0.1"
FILES = (replay.SUMMARY, replay.LINES, replay.PAGE)


def policies() -> tuple[str, ...]:
    return get_args(get_type_hints(ConductorConfig)["policy"])


def run_once(folder: str, policy: str, limit: int | None) -> None:
    given = {"policy": policy, "slo": SLO} | ({"limit": str(limit)} if limit else {})
    began, options = time.process_time(), parse_options(given)
    trace = replay.check(str(TRACE), limit=options.limit)
    with replay.lines_file(folder) as lines:
        done = replay.replay_trace(trace, options, write=lines.write if lines else None)
    replay.write_report(folder, done.report, replay_page.render(done.replay, done.report))
    seconds, report = time.process_time() - began, done.report
    emit(
        cpu_s=round(seconds, 3), num_requests=report.requests.total, num_events=done.replay.num_events,
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        effective_share=report.service.effective_share, ttft_ms_mean=report.latency.ttft_ms.mean,
    )  # fmt: skip


def run_apart(folder: Path, policy: str, limit: int | None, hash_seed: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--once", str(folder), "--policy", policy]
    command += ["--limit", str(limit)] if limit else []
    environ = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environ)
    line: dict[str, float] = json.loads(done.stdout)
    emit(policy=policy, **line)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="joint" if "joint" in policies() else "algorithm1", choices=policies())
    parser.add_argument("--limit", type=int, help="requests from the beginning")
    parser.add_argument("--quick", action="store_true", help="the first 2,000 requests")
    parser.add_argument("--once", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    limit = 2_000 if options.quick else options.limit
    if options.once:
        run_once(options.once, options.policy, limit)
        return
    if not TRACE.exists():
        raise SystemExit(f"replay: the trace {TRACE} is not there, so nothing can be replayed")
    with tempfile.TemporaryDirectory(prefix="mooncake-bench-") as folder:
        runs = [run_apart(Path(folder) / str(seed), options.policy, limit, seed) for seed in (1, 2)]
        same = all(len({(Path(folder) / str(seed) / name).read_bytes() for seed in (1, 2)}) == 1 for name in FILES)
    rate = sum(line["num_requests"] for line in runs) / sum(line["cpu_s"] for line in runs)
    peak = max(line["peak_rss_mb"] for line in runs)
    finish("replay", {"requests_per_cpu_s": rate, "peak_rss_mb": peak, "identical": float(same)})


if __name__ == "__main__":
    main()
