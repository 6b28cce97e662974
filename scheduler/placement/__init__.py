"""Placement policies: sibling files of one shape. `choose(ask, now, rng)` has no side effects but drawing from `rng`,
and whose turn it is in round_robin.
"""

from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.placement.algorithm1 import Algorithm1
from mooncake.scheduler.placement.base import Ask, Batches, Decision, Known, Offers, Policy
from mooncake.scheduler.placement.joint import Joint
from mooncake.scheduler.placement.least_load import LeastLoad
from mooncake.scheduler.placement.local_cache_aware import LocalCacheAware
from mooncake.scheduler.placement.random_choice import RandomChoice
from mooncake.scheduler.placement.round_robin import RoundRobin

__all__ = ["Ask", "Batches", "Decision", "Known", "Offers", "Policy", "make_policy"]


def make_policy(config: ConductorConfig, known: Known) -> Policy:
    match config.policy:
        case "random":
            return RandomChoice(known)
        case "round_robin":
            return RoundRobin(known)
        case "least_load":
            return LeastLoad(known)
        case "local_cache_aware":
            return LocalCacheAware(known)
        case "algorithm1":
            return Algorithm1(known, config.threshold)
        case "joint":
            return Joint(known, config.joint)
