"""Least load: the prefill instance with the shortest queue, the decode instance with the shortest step. It reuses
what the chosen instance or its node happens to have; a baseline.
"""

from __future__ import annotations

import random

from mooncake.scheduler.costs import BlockCosts, local_reuse
from mooncake.scheduler.placement.base import Ask, Decision, decide, decide_decode_only, find_pools
from mooncake.scheduler.view import View


class LeastLoad:
    name = "least_load"

    def __init__(self, view: View, costs: BlockCosts) -> None:
        self._view = view
        self._costs = costs

    def choose(self, ask: Ask, now: int, rng: random.Random) -> Decision | None:
        pools = find_pools(self._view, ask)
        if pools is None:
            return None
        if ask.decode_only:
            return decide_decode_only(self._view, ask, pools, rng)
        reuse = local_reuse(self._view, ask.match, self._costs)
        return decide(self._view, ask, pools, reuse, True, self._costs, now, rng)
