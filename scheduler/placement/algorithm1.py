"""Algorithm 1 of the paper (FACTS section 2): for every prefill instance, compute its local match, or fetch the
longest match in the cluster if that is more than `threshold` times longer; take the instance with the least predicted
TTFT.

Fetching leaves a copy at the fetching node: that is how hot blocks spread. A placement names one source, so fetching
moves all that the instance's own pages lack, not only the gap to its node's match.
"""

from __future__ import annotations

import random

import numpy as np

from mooncake.scheduler.costs import BlockCosts, Reuse, best_node, local_reuse
from mooncake.scheduler.placement.base import Ask, Decision, decide, decide_decode_only, find_pools
from mooncake.scheduler.view import View


class Algorithm1:
    name = "algorithm1"

    def __init__(self, view: View, costs: BlockCosts, threshold: float) -> None:
        self._view = view
        self._costs = costs
        self._threshold = threshold

    def choose(self, ask: Ask, now: int, rng: random.Random) -> Decision | None:
        pools = find_pools(self._view, ask)
        if pools is None:
            return None
        if ask.decode_only:
            return decide_decode_only(self._view, ask, pools, rng)
        reuse = self._reuse(ask)
        return decide(self._view, ask, pools, reuse, False, self._costs, now, rng)

    def _reuse(self, ask: Ask) -> Reuse:
        view, costs = self._view, self._costs
        local = local_reuse(view, ask.match, costs)
        node, best, num_ssd = best_node(view, ask.match)
        fetch = best > np.maximum(local.blocks * self._threshold, local.blocks)
        if not fetch.any():
            return local
        fetch_ns = (best - local.own) * costs.remote_ns + num_ssd * costs.ssd_ns
        return Reuse(
            own=local.own,
            blocks=np.where(fetch, best, local.blocks),
            node=np.where(fetch, node, local.node),
            load_ns=np.where(fetch, fetch_ns, local.load_ns),
        )
