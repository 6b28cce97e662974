"""Placement policies: sibling files of one shape. `choose(ask, now, rng)` has no side effects but drawing from
`rng`.
"""

from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.costs import BlockCosts
from mooncake.scheduler.placement.algorithm1 import Algorithm1
from mooncake.scheduler.placement.base import Ask, Decision, Policy
from mooncake.scheduler.placement.least_load import LeastLoad
from mooncake.scheduler.view import View

__all__ = ["Algorithm1", "Ask", "Decision", "LeastLoad", "Policy", "make_policy"]


def make_policy(config: ConductorConfig, view: View) -> Policy:
    costs = BlockCosts.of(config.block_tokens, config.kv_token_bytes, config.rates)
    if config.policy == "least_load":
        return LeastLoad(view, costs)
    return Algorithm1(view, costs, config.threshold)
