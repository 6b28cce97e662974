"""Which unleased object goes next. Policies are siblings of one shape; the core asks and evicts, a policy only orders."""

from __future__ import annotations

from collections.abc import Callable

from mooncake.store.eviction.base import EvictionPolicy
from mooncake.store.eviction.lfu import Lfu
from mooncake.store.eviction.lru import Lru

__all__ = ["POLICIES", "EvictionPolicy", "Lfu", "Lru"]

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": Lru, "lfu": Lfu}
