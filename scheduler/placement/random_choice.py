"""Random: any prefill instance, as in the paper's Figure 5. The decode instance is the one with the shortest step, so
that comparisons show what the choice of the prefill instance does. It reuses what that one happens to have; a
baseline.
"""

from __future__ import annotations

import random

from mooncake.scheduler.placement.base import Ask, Candidates, Decision, Known, Offers, decide, local_prices


class RandomChoice:
    name = "random"

    def __init__(self, known: Known) -> None:
        self._known = known

    def choose(self, ask: Ask, now: int, rng: random.Random) -> Decision | None:
        return decide(self._known, ask, self._choose_prefill, now, rng)

    def _choose_prefill(self, ask: Ask, candidates: Candidates, now: int, rng: random.Random) -> Offers:
        rows = candidates.prefill_mask.nonzero()[0].tolist()
        prices = local_prices(self._known, ask, candidates, now)
        offer = prices.offer(rows[rng.randrange(len(rows))])
        return Offers(prices, [offer], offer)
