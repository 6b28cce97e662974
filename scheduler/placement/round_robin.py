"""Round robin: the prefill instances in turn, by name, so that a joining or leaving one does not begin a new round.
The decode instance is the one with the shortest step. It reuses what the prefill instance happens to have; a
baseline.
"""

from __future__ import annotations

import random

from mooncake.scheduler.placement.base import Ask, Candidates, Decision, Known, Offers, decide, local_prices


class RoundRobin:
    """Whose turn it is moves on with every choice, also with one that is not carried out."""

    name = "round_robin"

    def __init__(self, known: Known) -> None:
        self._known = known
        self._last = ""

    def choose(self, ask: Ask, now: int, rng: random.Random) -> Decision | None:
        return decide(self._known, ask, self._choose_prefill, now, rng)

    def _choose_prefill(self, ask: Ask, candidates: Candidates, now: int, rng: random.Random) -> Offers:
        pool = candidates.prefill
        names = sorted(pool.names[row] for row in candidates.prefill_mask.nonzero()[0].tolist())
        self._last = next((name for name in names if name > self._last), names[0])
        prices = local_prices(self._known, ask, candidates, now)
        offer = prices.offer(pool.rows[self._last])
        return Offers(prices, [offer], offer)
