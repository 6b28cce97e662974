"""Algorithm 1 of the paper (FACTS section 2): for every prefill instance, compute its local match, or fetch the
longest match in the cluster if that is more than `threshold` times longer; take the instance with the least predicted
TTFT, and the decode instance by load.

Fetching leaves a copy at the fetching node: that is how hot blocks spread. A placement names one source, so fetching
moves all that the instance's own pages lack, not only the gap to its node's match.
"""

from __future__ import annotations

import random

from mooncake.scheduler.costs import PrefillPrices, find_source
from mooncake.scheduler.placement.base import Ask, Candidates, Decision, Known, Offers, decide, find_cheapest


class Algorithm1:
    name = "algorithm1"

    def __init__(self, known: Known, threshold: float) -> None:
        self._known = known
        self._threshold = threshold

    def choose(self, ask: Ask, now: int, rng: random.Random) -> Decision | None:
        return decide(self._known, ask, self._choose_prefill, now, rng)

    def _choose_prefill(self, ask: Ask, candidates: Candidates, now: int, rng: random.Random) -> Offers:
        view, costs, pool = self._known.view, self._known.costs, candidates.prefill
        match, links, threshold = ask.match, view.links, self._threshold
        source = find_source(match, view.node_bits, pool, links, costs, now, longest=True)
        prices = PrefillPrices(pool, match, ask.num_tokens, source, links, costs, now, threshold=threshold)
        return find_cheapest(prices, match, candidates.prefill_mask)
