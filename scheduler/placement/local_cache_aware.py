"""Local cache-aware: every prefill instance reuses what it or its own node has; the one with the least predicted TTFT
is taken. Nothing is fetched from another node. A baseline, and a strong one (FACTS section 2, Honesty).
"""

from __future__ import annotations

import random

from mooncake.scheduler.placement.base import (
    Ask,
    Candidates,
    Decision,
    Known,
    Offers,
    decide,
    find_cheapest,
    local_prices,
)


class LocalCacheAware:
    name = "local_cache_aware"

    def __init__(self, known: Known) -> None:
        self._known = known

    def choose(self, ask: Ask, now: int, rng: random.Random) -> Decision | None:
        return decide(self._known, ask, self._choose_prefill, now, rng)

    def _choose_prefill(self, ask: Ask, candidates: Candidates, now: int, rng: random.Random) -> Offers:
        prices = local_prices(self._known, ask, candidates, now)
        return find_cheapest(prices, ask.match, candidates.prefill_mask)
