"""Which unleased object goes next. Policies are siblings of one shape; the core asks and evicts, a policy only orders."""

from __future__ import annotations

from collections.abc import Callable

from mooncake.store.eviction.base import EvictionPolicy
from mooncake.store.eviction.fifo import Fifo
from mooncake.store.eviction.learned import Learned
from mooncake.store.eviction.lfu import Lfu
from mooncake.store.eviction.lru import Lru
from mooncake.store.eviction.s3fifo import S3Fifo

__all__ = ["DEFAULT_POLICY", "POLICIES", "EvictionPolicy", "Fifo", "Learned", "Lfu", "Lru", "S3Fifo"]

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "fifo": Fifo,
    "s3fifo": S3Fifo,
    "learned": Learned,
}
DEFAULT_POLICY = "lru"
