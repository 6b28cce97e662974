"""Hit rates by token of one cache of 3 M tokens over the conversation trace, our own eviction policy beside LRU, and what a
block costs in each. `python benchmarks/hit_rates.py [TRACE]`; without the trace, nothing."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from common import ROOT, emit, finish

from mooncake.sim.hit_rate import hit_rate
from mooncake.store.eviction import POLICIES
from mooncake.trace.files import open_trace

TRACE = ROOT.parent / "shared" / "traces" / "conversation_trace.jsonl"
CAPACITY_TOKENS = 3_000_000
BLOCK_TOKENS = 512
NAMES = {"own": "learned", "lru": "lru"}


def measure(trace: Path) -> dict[str, float]:
    requests = tuple(open_trace(trace))
    figures = {}
    for name, policy in NAMES.items():
        began = time.process_time()
        found = hit_rate(requests, BLOCK_TOKENS, POLICIES[policy](), CAPACITY_TOKENS // BLOCK_TOKENS)
        assert found is not None
        us_per_block = 1e6 * (time.process_time() - began) / found.num_references
        figure = f"hit_conversation_3m_{name}"
        emit(figure=figure, policy=policy, value=round(found.by_token, 4), us_per_block=round(us_per_block, 2))
        figures |= {figure: found.by_token, f"us_per_block_{name}": us_per_block}
    return figures


def main() -> None:
    trace = Path(sys.argv[1]) if len(sys.argv) > 1 else TRACE
    finish("hit_rates", measure(trace) if trace.is_file() else {})


if __name__ == "__main__":
    main()
