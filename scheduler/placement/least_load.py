"""Least load: the prefill instance with the shortest queue, the decode instance with the shortest step. It reuses
what the chosen instance or its node happens to have; a baseline.
"""

from __future__ import annotations

import random

from mooncake.scheduler.placement.base import Ask, Candidates, Decision, Known, Offers, decide, local_prices


class LeastLoad:
    name = "least_load"

    def __init__(self, known: Known) -> None:
        self._known = known

    def choose(self, ask: Ask, now: int, rng: random.Random) -> Decision | None:
        return decide(self._known, ask, self._choose_prefill, now, rng)

    def _choose_prefill(self, ask: Ask, candidates: Candidates, now: int, rng: random.Random) -> Offers:
        mask = candidates.prefill_mask
        row = next(row for _busy, _turn, row in candidates.prefill.queue if mask[row])
        prices = local_prices(self._known, ask, candidates, now)
        offer = prices.offer(row)
        return Offers(prices, [offer], offer)
